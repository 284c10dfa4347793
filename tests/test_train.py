"""Tests of the training loop, the command line and the files in the run folder."""

import json
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from conftest import TINY, load
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

import reward
import sayo_mini
from analysis.alarms import ALARMS, print_alarms, trend_alarms
from analysis.html_report import first_alarm, line_chart, metric_charts
from config import TINY as PRESET
from config import Config
from model import Completions
from runtime.parser import parse_config
from sayo_mini import learning_rate, train_step
from sources import epoch_index, load_datasets
from sources.scenes import Scenes

ROOT = Path(__file__).parent.parent
FAST = "--device cpu --no-load_in_4bit --prompts_per_step 2 --num_generations 4".split()
FAST += "--eval_examples 2 --max_completion_length 20 --model_name_or_path".split() + [str(TINY)]


def run(folder, flags="", expect=0):
    """Run the program in this process; check the exit code."""
    argv = [*FAST, "--output_dir", str(folder), *shlex.split(flags)]
    assert sayo_mini.main(argv) == expect


def resume(folder):
    """Continue a run without any other flag: the settings come from the run."""
    assert sayo_mini.main(["--resume", "--output_dir", str(folder)]) == 0


def run_process(*flags, **env):
    """Run the real command in its own process with only these flags."""
    return subprocess.run(
        [sys.executable, "sayo_mini.py", *map(str, flags)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | env,
    )


def read_log(folder, name="metrics.jsonl"):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def load_trained_adapter(folder):
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def make_config(tmp_path, flags=""):
    return parse_config([*FAST, "--output_dir", str(tmp_path / "run"), *shlex.split(flags)])


def copy_parameters(vlm):
    return {name: p.detach().clone() for name, p in vlm.model.named_parameters()}


def make_adamw(vlm):
    params = [p for p in vlm.model.parameters() if p.requires_grad]
    return torch.optim.AdamW(params, lr=1e-3, weight_decay=0)


def make_step(vlm, cfg, optimizer, count=2, stop=()):
    """Run `train_step` on the first `count` training scenes. Returns: (metrics, samples)."""
    scenes = Scenes("train", 8)
    examples = [scenes[i] for i in range(count)]
    return train_step(vlm, examples, cfg, optimizer, torch.Generator().manual_seed(0), stop)


def step_and_compare(tmp_path, flags="", **settings):
    """Make one step with plain SGD, because Adam would scale up even a tiny gradient.
    Returns: (metrics, samples, parameters before, parameters after)."""
    torch.manual_seed(0)
    cfg, vlm = make_config(tmp_path, f"--weight_decay 0 {flags}"), load(**settings)
    optimizer = torch.optim.SGD([p for p in vlm.model.parameters() if p.requires_grad], lr=0.1)
    before = copy_parameters(vlm)
    return *make_step(vlm, cfg, optimizer), before, dict(vlm.model.named_parameters())


# --- one step ---


def test_first_step_changes_lora_b_and_nothing_else(tmp_path):
    """The gradient of LoRA's A is 0 as long as B is 0, and everything else is frozen."""
    torch.manual_seed(0)
    vlm = load()
    for name, p in vlm.model.named_parameters():
        if "lora_B" in name:
            p.data.zero_()
    before = copy_parameters(vlm)
    metrics, _ = make_step(vlm, make_config(tmp_path), make_adamw(vlm))
    changed = {n for n, p in vlm.model.named_parameters() if not torch.equal(p, before[n])}
    assert metrics["grad_norm"] > 0
    assert changed and all("lora_B" in name for name in changed)
    assert len(changed) == 4 * 7


def record_forward_tokens(vlm):
    """Returns: a list to which each forward of the language model appends its token count."""
    counts = []
    vlm.core.model.language_model.layers[0].register_forward_hook(
        lambda module, args, kwargs, out: counts.append(out.shape[0] * out.shape[1]),
        with_kwargs=True,
    )
    original = vlm._decoder

    def decoder(*args):
        decoder = original(*args)
        step = decoder.step
        decoder.step = lambda token, t: counts.append(len(token)) or step(token, t)
        return decoder

    vlm._decoder = decoder
    return counts


@pytest.mark.parametrize("beta, forwards", [(0.001, 3), (0.0, 2)])
def test_forward_tokens_of_a_step(tmp_path, monkeypatch, beta, forwards):
    """A group takes at most 3 (P + G*C) tokens with KL and 2 (P + G*C) without, because the prompt
    is never repeated G times."""
    packed_lengths = []
    original = sayo_mini.score_and_reward

    def score_and_reward(vlm, rollouts, cfg):
        lengths = [len(prompt.input_ids) + c.ids.numel() for _, prompt, c in rollouts]
        packed_lengths.extend(lengths)
        return original(vlm, rollouts, cfg)

    monkeypatch.setattr(sayo_mini, "score_and_reward", score_and_reward)
    vlm = load()
    counts = record_forward_tokens(vlm)
    cfg = make_config(tmp_path, f"--beta {beta} --temperature 2")
    metrics, _ = make_step(vlm, cfg, make_adamw(vlm))
    assert metrics["frac_reward_zero_std"] == 0  # a skipped group would make the count too low
    assert len(packed_lengths) == 2
    total = sum(packed_lengths)
    assert (forwards - 1) * total < sum(counts) <= forwards * total


@pytest.mark.parametrize(
    "completions_at_once, signals, batch_sizes",
    [(64, [], [3]), (9, [], [2, 1]), (1, [], [1, 1, 1]), (1, ["SIGINT"], [1])],
)
def test_questions_are_sampled_in_batches(
    tmp_path, monkeypatch, completions_at_once, signals, batch_sizes
):
    """There are three questions with four completions each. A signal during sampling stops the step
    before the next batch."""
    vlm, sizes, stop = load(), [], []
    original = vlm.sample_groups

    def sample_groups(prompts, *args):
        sizes.append(len(prompts))
        stop.extend(signals)
        return original(prompts, *args)

    monkeypatch.setattr(vlm, "sample_groups", sample_groups)
    monkeypatch.setattr(sayo_mini, "SAMPLED_AT_ONCE", completions_at_once)
    with pytest.raises(sayo_mini.Stopped) if signals else nullcontext():
        make_step(vlm, make_config(tmp_path), make_adamw(vlm), count=3, stop=stop)
    assert sizes == batch_sizes


def test_splitting_a_group_changes_only_memory(tmp_path):
    """One forward for four completions and one for each lead to the same update; a different beta
    does not. All tokens count and the completions vary, because otherwise rounding would decide
    which entropy near 0 is the highest and would be divided by a tiny standard deviation."""
    flags = "--token_fraction 1 --temperature 2 --beta"
    *_, whole = step_and_compare(tmp_path / "a", f"{flags} 0.5")
    split_flags = f"{flags} 0.5 --completions_per_forward 1"
    *_, split = step_and_compare(tmp_path / "b", split_flags, completions_per_forward=1)
    *_, other_beta = step_and_compare(tmp_path / "c", f"{flags} 0")

    def largest_difference(parameters):
        names = [name for name in whole if "lora" in name]
        return max((whole[name] - parameters[name]).abs().max().item() for name in names)

    assert largest_difference(split) < 1e-6
    assert largest_difference(other_beta) > 1e-4


def test_group_without_variance_is_skipped_and_counted(tmp_path):
    """With this weight all rewards are equal, so there is no update and no division by 0."""
    metrics, _, before, after = step_and_compare(tmp_path, "--reward_weights format=1e-12")
    assert metrics["frac_reward_zero_std"] == 1
    assert metrics["grad_norm"] == 0 and metrics["loss"] == 0
    assert all(torch.equal(before[n], after[n]) for n in before)


def nan_rewards(attention, *args):
    """Replaces `reward.attention_reward`."""
    return torch.full(attention.shape[:1], math.nan)


def test_non_finite_update_is_skipped_and_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(reward, "attention_reward", nan_rewards)
    metrics, _, before, after = step_and_compare(tmp_path)
    assert metrics["skipped_updates"] == 1
    assert all(torch.equal(before[n], after[n]) for n in before)


def test_ratio_leaves_1_only_after_the_first_update(tmp_path):
    metrics, *_ = step_and_compare(tmp_path / "a")
    assert metrics["ratio"] == pytest.approx(1, abs=1e-6) and metrics["clip_ratio/low_mean"] == 0
    metrics, *_ = step_and_compare(tmp_path / "b", "--num_iterations 3")
    assert abs(metrics["ratio"] - 1) > 1e-6


def test_reward_is_the_weighted_sum(tmp_path):
    flags = "--reward_weights attention=0.5,accuracy=2"
    metrics, samples, *_ = step_and_compare(tmp_path, flags)
    expected = [0.5 * s["attention"] + 2 * s["accuracy"] for s in samples]
    assert metrics["reward"] == pytest.approx(sum(expected) / len(expected), abs=1e-5)
    assert len(samples) == 8 and {s["id"] for s in samples} == {"train-0-0", "train-0-1"}


# --- alarms ---


DEGENERATE_POLICIES = [  # (the text of every completion, the metric with an alarm)
    (None, None),  # the model's own completions raise no alarm
    ("the dot on red r1 c1 is blue . <answer> blue </answer>", "frac_reward_zero_std"),
    ("red card red card red card red card red card red", "completions/seq_rep_3"),
    ("the dot on red r1 c1 is blue . <answer> blue", "completions/unclosed_tags"),
]


@pytest.mark.parametrize("text, metric", DEGENERATE_POLICIES)
def test_degenerate_policy_raises_an_alarm(tmp_path, capsys, monkeypatch, text, metric):
    """Replications of such rewards ended in policies like these: the same text for every question,
    repeated words, or unclosed tags."""

    def sample_groups(vlm, prompts, G, *args):
        ended = text + vlm.tokenizer.eos_token
        ids = vlm.tokenizer(ended, return_tensors="pt", add_special_tokens=False).input_ids
        ids = ids.expand(G, -1)
        mask, finished = torch.ones_like(ids).bool(), torch.ones(G).bool()
        return [Completions(ids, mask, [text] * G, 1.0, finished) for _ in prompts]

    if text:
        monkeypatch.setattr("model.Vlm.sample_groups", sample_groups)
    run(tmp_path, "--max_steps 1 --eval_examples 0")
    alarms = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step 1: ")]
    assert any(metric in alarm for alarm in alarms) if metric else not alarms


def test_alarm_is_printed_once(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(ALARMS, "entropy", (0.0, "always"))
    run(tmp_path, "--max_steps 3 --eval_examples 0")
    assert capsys.readouterr().out.count("always") == 1


# --- runs ---


def test_training_and_held_out_scenes_come_from_their_own_splits():
    for name in (str(TINY), "Qwen/Qwen3-VL-2B-Instruct"):
        cfg = Config(model_name_or_path=name, max_steps=2, eval_examples=3)
        train_set, eval_set = load_datasets(cfg)
        assert train_set[0].id.startswith("train-") and eval_set[0].id.startswith("test-")
        assert len(train_set) == 2 * Config.prompts_per_step and len(eval_set) == 3
        assert eval_set[0].image.width == (112 if name == str(TINY) else 448)


def test_same_seed_same_run_and_other_seed_other_run(tmp_path):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        run(tmp_path / name, f"--max_steps 2 --seed {seed}")
    adapter = "adapter/adapter_model.safetensors"
    for file in ("metrics.jsonl", "samples.jsonl", "before.json", "after.json", adapter):
        a, b, c = ((tmp_path / name / file).read_bytes() for name in "abc")
        assert a == b, file
        # Before training the adapter changes nothing, so the seed has no effect.
        assert a != c or file == "before.json", file


def test_seed_reaches_adapter_and_sampling(tmp_path, monkeypatch):
    """Scenes and order are fixed, because a different order alone would change the run."""
    datasets = Scenes("train", 2), Scenes("test", 0)
    monkeypatch.setattr(sayo_mini, "load_datasets", lambda cfg: datasets)
    monkeypatch.setattr("sources.epoch_index", lambda k, n, seed: k % n)
    texts, adapters = [], []
    for seed in (3, 4):
        folder = tmp_path / str(seed)
        run(folder, f"--max_steps 1 --temperature 2 --learning_rate 0 --seed {seed}")
        texts.append([row["text"] for row in read_log(folder, "samples.jsonl")])
        saved = sorted(load_trained_adapter(folder).items())
        adapters.append(next(value for name, value in saved if "lora_A" in name))
    assert texts[0] != texts[1]
    assert not torch.equal(*adapters)


@pytest.mark.parametrize("precision", ["", "--load_in_4bit"], ids=["fp32", "nf4"])
def test_resumed_run_equals_an_uninterrupted_one(tmp_path, monkeypatch, precision):
    """The run is killed after step 3, with the last checkpoint at step 2. Step 3 is repeated and
    logged again, bit for bit."""
    flags = f"--max_steps 4 --save_steps 2 {precision}"
    whole, interrupted = tmp_path / "whole", tmp_path / "interrupted"
    run(whole, flags)
    original, steps = sayo_mini.train_step, []

    def killed(*args):
        steps.append(1)
        if len(steps) == 4:
            raise RuntimeError("power cut")
        return original(*args)

    monkeypatch.setattr(sayo_mini, "train_step", killed)
    with pytest.raises(RuntimeError, match="power cut"):
        run(interrupted, flags)
    assert len(read_log(interrupted)) == 3
    half_a_line = '{"step": 4, "lo'  # a kill can leave half a line behind
    (interrupted / "metrics.jsonl").open("a").write(half_a_line)
    monkeypatch.setattr(sayo_mini, "train_step", original)
    resume(interrupted)
    adapter = "adapter/adapter_model.safetensors"
    for file in ("metrics.jsonl", "samples.jsonl", "after.json", adapter):
        assert (interrupted / file).read_bytes() == (whole / file).read_bytes(), file
    a, b = (load_file(folder / "checkpoint.safetensors") for folder in (whole, interrupted))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_resume_without_checkpoint_starts_from_the_beginning(tmp_path, capsys):
    run(tmp_path / "run", "--max_steps 1 --resume")
    assert "starting from the beginning" in capsys.readouterr().out
    assert [row["step"] for row in read_log(tmp_path / "run")] == [1]


@pytest.mark.slow
def test_ctrl_c_saves_and_prints_the_command_that_resumes(tmp_path):
    folder = tmp_path / "run"
    flags = ["--max_steps", "500", "--eval_examples", "0", "--output_dir", str(folder)]
    command = [sys.executable, "sayo_mini.py", *FAST, *flags]
    program = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    while not (folder / "metrics.jsonl").exists() or not read_log(folder):
        assert program.poll() is None
        time.sleep(0.1)
    program.send_signal(signal.SIGINT)
    out, _ = program.communicate(timeout=60)
    assert program.returncode == 130 and f"--resume --output_dir {folder}" in out
    assert "value" in " ".join(load_file(folder / "checkpoint.safetensors"))


@pytest.mark.parametrize("moment", ["before", "after"])
def test_ctrl_c_during_an_evaluation_ends_the_program(tmp_path, monkeypatch, moment):
    """Only the training loop delays signals. After it, the old SIGINT handler must be restored."""
    original = sayo_mini.evaluate

    def evaluate(vlm, examples, cfg, name, before=None):
        if name == moment:
            signal.raise_signal(signal.SIGINT)
        return original(vlm, examples, cfg, name, before)

    monkeypatch.setattr(sayo_mini, "evaluate", evaluate)
    # An earlier test may have interrupted a run inside its loop.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    run(tmp_path / "run", "--max_steps 1", expect=130)
    monkeypatch.setattr(sayo_mini, "evaluate", original)
    resume(tmp_path / "run")


def test_files_of_a_run(tmp_path):
    folder = tmp_path / "run"
    run(folder, "--max_steps 2")
    names = "config.json metrics.jsonl samples.jsonl before.json after.json look.png report.html"
    names += " response.svg checkpoint.safetensors adapter timing.jsonl lock"
    names += " look.gif before_after.png"
    assert {path.name for path in folder.iterdir()} == set(names.split())
    assert json.loads((folder / "config.json").read_text())["num_generations"] == 4
    assert len(read_log(folder, "samples.jsonl")) == 2 * 2 * 4
    assert Image.open(folder / "look.png").width > 3 * 300
    explained = (ROOT / "docs" / "logging.md").read_text()
    for name in read_log(folder)[0]:
        assert f"`{name}`" in explained, f"docs/logging.md does not explain {name}"


def test_adapter_loads_in_plain_peft(tmp_path):
    folder = tmp_path / "run"
    run(folder, "--max_steps 2 --learning_rate 1e-2 --warmup_steps 0")
    plain = AutoModelForImageTextToText.from_pretrained(TINY)
    ids = torch.tensor([[1, 12, 13, 14]])
    with torch.no_grad():
        base = plain(input_ids=ids).logits
        loaded = PeftModel.from_pretrained(plain, folder / "adapter")(input_ids=ids).logits
    assert (base - loaded).abs().max() > 1e-4
    saved = load_file(folder / "checkpoint.safetensors")
    values = {
        name.split("|")[0].replace(".default", ""): value
        for name, value in saved.items()
        if name.endswith("|value")
    }
    adapter = load_trained_adapter(folder)
    assert values.keys() == adapter.keys()
    assert all(torch.equal(values[name], adapter[name]) for name in values)


def test_own_dataset(tmp_path):
    """Training and evaluation use different images of a .jsonl file with 12 scenes."""
    scenes, lines = Scenes("train", 12), []
    for i in range(12):
        example = scenes[i]
        example.image.save(tmp_path / f"{i}.png")
        row = {"image": f"{i}.png", "question": example.question, "answer": example.answer}
        lines.append(json.dumps(row | {"boxes": example.boxes, "id": f"mine-{i}"}))
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    folder = tmp_path / "run"
    run(folder, f"--max_steps 2 --dataset {tmp_path / 'data.jsonl'}")
    trained = {row["id"] for row in read_log(folder, "samples.jsonl")}
    held_out = {row["id"] for row in json.loads((folder / "before.json").read_text())}
    assert trained and held_out and not trained & held_out
    assert all(name.startswith("mine-") for name in trained | held_out)


# --- the command and refused settings ---


@pytest.mark.slow
def test_real_command(tmp_path):
    """Run the command of a user without a GPU, shortened: two steps of the tiny model in 4 bits."""
    flags = ["--max_steps", 2, "--eval_examples", 3, "--output_dir", tmp_path / "run"]
    process = run_process(*flags, CUDA_VISIBLE_DEVICES="")
    assert process.returncode == 0, process.stderr
    assert "running on the CPU: using the tiny model" in process.stdout
    for word in ("greedy accuracy", "AUROC", "before", "after", "chance"):
        assert word in process.stdout
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["load_in_4bit"] and config["reward_weights"] == Config.reward_weights
    assert all(math.isfinite(v) for row in read_log(tmp_path / "run") for v in row.values())


def test_help_explains_every_flag():
    process = run_process("--help")
    assert process.returncode == 0
    for name in Config.__dataclass_fields__:
        assert f"--{name} " in process.stdout or f"--{name}," in process.stdout, name


def write_dataset(folder, **changes):
    """Write a data set of one line. `changes` replaces values; None drops a key."""
    Image.new("RGB", (64, 48), "red").save(folder / "red.png")
    (folder / "text.png").write_text("no picture")
    row = {"image": "red.png", "question": "what color ?", "answer": "red"}
    row |= {"boxes": [[0, 0, 10, 10]]} | changes
    text = json.dumps({key: value for key, value in row.items() if value is not None})
    (folder / "data.jsonl").write_text(text.replace("Infinity", "NaN"))
    return folder / "data.jsonl"


BAD_ROWS = {  # case -> (what is wrong in the row, a word of the message)
    "missing image": (dict(image="gone.png"), "gone.png"),
    "unreadable image": (dict(image="text.png"), "text.png"),
    "box outside": (dict(boxes=[[70, 0, 80, 10]]), "outside"),
    "inverted box": (dict(boxes=[[10, 0, 5, 10]]), "inverted"),
    "NaN box": (dict(boxes=[[math.inf, 0, 5, 10]]), "finite"),
    "no box": (dict(boxes=None), "boxes"),
    "empty answer": (dict(answer=" "), "answer"),
}
BAD_FLAGS = {  # case -> (flags, a word of the message)
    "unknown reward": ("--reward_weights beauty=1", "beauty"),
    "reward without number": ("--reward_weights attention", "--reward_weights"),
    "G = 1": ("--num_generations 1", "--num_generations"),
    "unknown flag": ("--learning_rat 1", "--learning_rat"),
    "not a number": ("--beta much", "--beta"),
    "layers": ("--layers last", "--layers"),
    "no such layer": ("--layers 9", "layer 9"),
    "format lengths": ("--format_lengths 5", "--format_lengths"),
    "not a model": ("--model_name_or_path tests", "tests"),
    "no such hub name": ("--model_name_or_path nobody/nothing", "nobody/nothing"),
    "no such file": ("--dataset nowhere.jsonl", "nowhere.jsonl"),
    "no CUDA": ("--device cuda", "cuda"),
}


def assert_refused(capfd, tmp_path, flags, word):
    """Check exit code 2, one line on stderr that contains `word`, and that nothing is written."""
    folder = tmp_path / "run"
    capfd.readouterr()
    run(folder, f"--max_steps 1 {flags}", expect=2)
    err = capfd.readouterr().err
    assert err.startswith("sayo_mini.py: ") and err.count("\n") == 1 and word in err, err
    assert not folder.exists()


@pytest.mark.parametrize("case", BAD_ROWS)
def test_bad_line_of_data_is_a_one_line_error(capfd, tmp_path, case):
    changes, word = BAD_ROWS[case]
    path = write_dataset(tmp_path, **changes)
    assert_refused(capfd, tmp_path, f"--dataset {path}", word)
    assert_refused(capfd, tmp_path, f"--dataset {path}", f"{path}:1")


@pytest.mark.parametrize("case", BAD_FLAGS)
def test_bad_flag_is_a_one_line_error(capfd, tmp_path, monkeypatch, case):
    monkeypatch.chdir(ROOT)
    if case == "no CUDA" and torch.cuda.is_available():
        pytest.skip("CUDA is available")
    flags, word = BAD_FLAGS[case]
    assert_refused(capfd, tmp_path, flags, word)


def test_unsupported_model_type_is_refused(capfd, tmp_path):
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text('{"model_type": "bert"}')
    assert_refused(capfd, tmp_path, f"--model_name_or_path {tmp_path / 'bert'}", "has type bert")


def test_missing_bitsandbytes_says_what_to_install(capfd, tmp_path, monkeypatch):
    available = "transformers.quantizers.quantizer_bnb_4bit.is_bitsandbytes_available"
    monkeypatch.setattr(available, lambda *args, **kwargs: False)
    assert_refused(capfd, tmp_path, "--load_in_4bit", "pip install bitsandbytes")


def test_no_permission_to_write_is_a_one_line_error(capfd, tmp_path):
    (tmp_path / "file").write_text("")  # not even root can create a folder below a file
    capfd.readouterr()
    run(tmp_path / "file" / "run", "--max_steps 1", expect=2)
    err = capfd.readouterr().err
    assert err.count("\n") == 1 and "--output_dir" in err and "file/run" in err


def test_existing_run_is_not_overwritten(capfd, tmp_path):
    run(tmp_path / "run", "--max_steps 1")
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    capfd.readouterr()
    run(tmp_path / "run", "--max_steps 1", expect=2)
    assert "--resume" in capfd.readouterr().err
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


def test_flags_override_the_tiny_preset(tmp_path):
    output = ["--output_dir", str(tmp_path / "run")]
    cfg = parse_config(["--model_name_or_path", str(TINY), "--max_steps", "7", *output])
    assert cfg.max_steps == 7 and cfg.prompts_per_step == PRESET["prompts_per_step"]
    cfg = parse_config(["--model_name_or_path", "Qwen/Qwen3-VL-2B-Instruct", *output])
    assert cfg == Config(output_dir=str(tmp_path / "run"))


@pytest.mark.slow
def test_command_prints_no_warning(tmp_path):
    """transformers logs no warning either: stderr contains only the progress bars."""
    process = run_process(*FAST, "--max_steps", 1, "--output_dir", tmp_path)
    assert process.returncode == 0
    lines = process.stderr.replace("\r", "\n").splitlines()
    assert [
        line for line in lines if line.strip() and "/s" not in line and "s/it" not in line
    ] == []


# --- learning rate and order of the examples ---


def test_learning_rate_schedule():
    cfg = Config(learning_rate=1.0, warmup_steps=4, max_steps=12)
    assert [learning_rate(cfg, step) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert [round(learning_rate(cfg, step), 6) for step in (4, 8, 12)] == [1.0, 0.5, 0.0]
    constant = Config(learning_rate=1.0, warmup_steps=4, lr_scheduler_type="constant")
    assert learning_rate(constant, 999) == 1.0


@pytest.mark.parametrize("warmup_steps, largest", [(0, 1e-3), (1000, 1e-6)])
def test_schedule_reaches_the_optimizer(tmp_path, warmup_steps, largest):
    """Adam's first step has the size of its learning rate, which is a thousandth of the peak in a
    warm-up of 1,000 steps."""
    run(tmp_path, f"--max_steps 1 --learning_rate 1e-3 --warmup_steps {warmup_steps}")
    saved = load_trained_adapter(tmp_path)
    change = max(value.abs().max().item() for name, value in saved.items() if "lora_B" in name)
    assert change == pytest.approx(largest, rel=0.05)


def test_every_epoch_visits_every_example_in_a_new_order():
    epochs = [[epoch_index(e * 9 + i, 9, seed=1) for i in range(9)] for e in range(3)]
    assert all(sorted(epoch) == list(range(9)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def shares(*blocks):
    """Rows of metrics.jsonl: (steps, share of right samples) after one another."""
    values = [share for steps, share in blocks for _ in range(steps)]
    related = {"attention/corr_accuracy": 0.5}
    return [{"step": i, "rewards/accuracy/mean": v} | related for i, v in enumerate(values, 1)]


SAYO_WEIGHTS = {"attention": 1.0, "format": 1.0}


def alarm_steps(rows, prompts_per_step=8, weights=SAYO_WEIGHTS):
    """{name of the alarm: its first step}."""
    found = list(trend_alarms(rows, prompts_per_step, weights))
    return {name: step for step, name, _ in reversed(found)}


def test_answers_that_get_worse_raise_an_alarm():
    """With 8 questions per step, means over 16 steps are compared."""
    falling = shares((16, 0.5), (16, 0.7), (20, 0.5))
    # The mean falls by 0.2 / 16 per step; it is 0.15 lower after 12 steps.
    assert alarm_steps(falling) == {"answers get worse": 44}
    first = next(trend_alarms(falling, 8, SAYO_WEIGHTS))
    assert "55% of the recent samples are right, 70% were at best" in first[2]
    assert not alarm_steps(falling[:43])
    assert not alarm_steps(shares((16, 0.5), (16, 0.7), (60, 0.56)))
    assert not alarm_steps(shares((2, 0.9), (13, 0.1)))  # too short for a mean
    assert alarm_steps(falling, 128) == {"answers get worse": 33}  # every step has enough questions


def correlated(value, rows):
    return [row | {"attention/corr_accuracy": value} for row in rows]


def test_a_smaller_decline_is_enough_if_attention_hardly_tells_what_is_right():
    falling = shares((16, 0.5), (16, 0.7), (20, 0.5))
    # The mean falls by 0.2 / 16 per step; it is 0.12 lower after 10 steps.
    assert alarm_steps(correlated(0.2, falling)) == {"answers get worse": 42}
    assert alarm_steps(correlated(0.25, falling)) == {"answers get worse": 44}
    for weights in (SAYO_WEIGHTS | {"accuracy": 1.0}, {"attention": 0.0, "format": 1.0}):
        assert alarm_steps(correlated(0.2, falling), 8, weights) == {"answers get worse": 44}


def test_an_attention_reward_that_misleads_raises_an_alarm():
    """With 8 questions per step, correlations are averaged over 8 steps."""
    rows = shares((20, 0.5))
    assert alarm_steps(correlated(-0.1, rows)) == {"attention misleads": 8}
    # The mean falls by 0.2 / 8 per step from 0.1: it is below -0.05 after 7 steps.
    changed = correlated(0.1, rows[:16]) + correlated(-0.1, rows)
    assert alarm_steps(changed) == {"attention misleads": 23}
    assert not alarm_steps(correlated(-0.04, rows))
    assert not alarm_steps(changed, weights=SAYO_WEIGHTS | {"accuracy": 1.0})
    assert not alarm_steps(changed, weights={"attention": 0.0, "format": 1.0})
    for share in (0.0, 0.05, 0.95, 1.0):  # hardly any right (or wrong) samples, or no answers known
        assert not alarm_steps(correlated(-0.1, shares((20, share))))


def test_the_alarm_for_worse_answers_is_printed_once_and_marked_in_the_report(capsys):
    rows, warned = shares((16, 0.5), (16, 0.7), (20, 0.5)), set()
    rows = [row | dict.fromkeys(ALARMS, 0.0) for row in rows]
    for step in range(1, len(rows) + 1):
        print_alarms(rows[:step], Config(prompts_per_step=8), warned)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "answers get worse" in line]
    assert (
        line.startswith("step 44: answers get worse: 55% of the recent samples") and "70%" in line
    )
    recovered = rows + [dict(rows[0], **row) for row in shares((40, 0.7))]  # a run that is resumed
    print_alarms(recovered, Config(prompts_per_step=8), set())
    assert "answers get worse" not in capsys.readouterr().out
    settings = {"prompts_per_step": 8, "reward_weights": "attention=1,format=1"}
    charts = metric_charts(rows, first_alarm(rows, settings))
    assert all("answers get worse" in chart for chart in charts if chart)
    assert not any("answers get worse" in chart for chart in metric_charts(rows))
    marked = line_chart("title", {"a": [0.0, 1.0, 2.0]}, mark=(2, "name"))
    assert 'class="alarm" d="M230.0,' in marked  # in the middle of 52 to 408
