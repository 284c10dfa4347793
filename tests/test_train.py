"""The loop, the command line and the run's folder: from the real command to what is on the disk."""

import json
import math
import os
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

import look
import reward
import sayo_mini
from data import region_mask
from model import Completions
from sayo_mini import Config, evaluate, learning_rate, parse, shuffled, train_step
from scenes import Scenes

HERE = Path(__file__).parent.parent
FAST = ["--device", "cpu", "--no-load_in_4bit", "--prompts_per_step", "2", "--num_generations", "4",
        "--eval_examples", "2", "--max_completion_length", "20", "--model_name_or_path", str(TINY)]  # fmt: skip


def run(*flags, expect=0):
    """The program in this process; returns nothing, checks the exit code."""
    assert sayo_mini.main([*FAST, *map(str, flags)]) == expect


def rows(folder, name="metrics.jsonl"):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def one_step(tmp_path, *flags, **settings):
    """One train_step on two scenes: (vlm, metrics, samples, adapter before, adapter after)."""
    torch.manual_seed(0)
    cfg = parse([*FAST, "--weight_decay", "0", "--output_dir", str(tmp_path / "run"), *flags])
    vlm = load(**settings)
    # plain SGD: the change is the gradient, which Adam would blow up to full size however small it is
    optimizer = torch.optim.SGD([p for p in vlm.model.parameters() if p.requires_grad], lr=0.1)
    before = {n: p.detach().clone() for n, p in vlm.model.named_parameters()}
    scenes = Scenes("train", 8)
    out = train_step(vlm, [scenes[0], scenes[1]], cfg, optimizer, torch.Generator().manual_seed(0))
    return vlm, *out, before, dict(vlm.model.named_parameters())


# --- one step --------------------------------------------------------------------------------------------------------


def test_the_first_step_moves_b_of_lora_and_nothing_else(tmp_path):
    """A's gradient is 0 as long as B is 0; everything else is frozen."""
    torch.manual_seed(0)
    vlm = load()
    for name, p in vlm.model.named_parameters():
        if "lora_B" in name:
            p.data.zero_()
    before = {n: p.detach().clone() for n, p in vlm.model.named_parameters()}
    cfg = parse([*FAST, "--output_dir", str(tmp_path / "run")])
    optimizer = torch.optim.AdamW([p for p in vlm.model.parameters() if p.requires_grad], lr=1e-3, weight_decay=0)
    scenes = Scenes("train", 8)
    metrics, _ = train_step(vlm, [scenes[0], scenes[1]], cfg, optimizer, torch.Generator().manual_seed(0))
    moved = {n for n, p in vlm.model.named_parameters() if not torch.equal(p, before[n])}
    assert metrics["grad_norm"] > 0
    assert moved and all("lora_B" in name for name in moved)
    assert len(moved) == 4 * 7


def count_tokens(vlm):
    """Hook: the tokens that go through the language model, forward by forward."""
    seen = []
    vlm.core.model.language_model.layers[0].register_forward_hook(
        lambda module, args, kwargs, out: seen.append(out.shape[0] * out.shape[1]), with_kwargs=True
    )
    return seen


@pytest.mark.parametrize("beta, forwards", [(0.001, 3), (0.0, 2)])
def test_forward_tokens_of_a_step(tmp_path, monkeypatch, beta, forwards):
    """At most 3 (P + G C) tokens a group with KL, 2 (P + G C) without: the prompt is never repeated G times."""
    seen, budget = [], []
    original = sayo_mini.judge

    def judge(vlm, group, *args, **kwargs):
        budget.append(len(group.prompt.input_ids) + group.completions.ids.numel())
        return original(vlm, group, *args, **kwargs)

    monkeypatch.setattr(sayo_mini, "judge", judge)
    vlm = load()
    seen = count_tokens(vlm)
    cfg = parse([*FAST, "--beta", str(beta), "--temperature", "2", "--output_dir", str(tmp_path / "run")])
    optimizer = torch.optim.AdamW([p for p in vlm.model.parameters() if p.requires_grad], lr=1e-3)
    scenes = Scenes("train", 8)
    metrics, _ = train_step(vlm, [scenes[0], scenes[1]], cfg, optimizer, torch.Generator().manual_seed(0))
    assert metrics["frac_reward_zero_std"] == 0  # no group was skipped, or the count would flatter
    assert len(budget) == 2
    assert (forwards - 1) * sum(budget) < sum(seen) <= forwards * sum(budget)


def test_questions_are_sampled_together_as_far_as_is_allowed(tmp_path, monkeypatch):
    """So many answers side by side; and a stop between two batches counts."""
    vlm, sizes, stop = load(), [], []
    original = vlm.sample_groups

    def sample(prompts, *args):
        sizes.append(len(prompts))
        stop.extend(end)
        return original(prompts, *args)

    monkeypatch.setattr(vlm, "sample_groups", sample)
    optimizer = torch.optim.AdamW([p for p in vlm.model.parameters() if p.requires_grad], lr=1e-3)
    scenes = [Scenes("train", 8)[i] for i in range(3)]
    cfg = parse([*FAST, "--num_generations", "4", "--output_dir", str(tmp_path / "run")])
    for together, expected, end in ((64, [3], []), (9, [2, 1], []), (1, [1, 1, 1], []), (1, [1], ["SIGINT"])):
        monkeypatch.setattr(sayo_mini, "TOGETHER", together)
        sizes.clear()
        with pytest.raises(sayo_mini.Stopped) if end else nullcontext():
            train_step(vlm, scenes, cfg, optimizer, torch.Generator().manual_seed(0), stop)
        assert sizes == expected


def test_splitting_a_group_changes_nothing_but_memory(tmp_path):
    """One forward for four completions or one for each: the same update; with another beta it is another. All tokens
    count here, and the answers vary: else rounding decides which entropies near 0 are the highest, and is divided by
    a tiny standard deviation."""
    flags = ["--token_fraction", "1", "--temperature", "2", "--beta"]
    *_, whole = one_step(tmp_path / "a", *flags, "0.5")
    *_, split = one_step(tmp_path / "b", *flags, "0.5", "--completions_per_forward", "1", completions_per_forward=1)
    *_, other = one_step(tmp_path / "c", *flags, "0")
    worst = [max((whole[n] - x[n]).abs().max().item() for n in whole if "lora" in n) for x in (split, other)]
    assert worst[0] < 1e-6 and worst[1] > 1e-4


def test_a_group_without_variance_is_skipped_and_counted(tmp_path):
    """With a weight of 0 every answer earns 0: nothing moves, and nothing divides by 0."""
    _, metrics, _, before, after = one_step(tmp_path, "--reward_weights", "format=0")
    assert metrics["frac_reward_zero_std"] == 1 and metrics["grad_norm"] == 0 and metrics["loss"] == 0
    assert all(torch.equal(before[n], after[n]) for n in before)


def test_a_step_that_is_not_finite_is_skipped_and_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(reward, "attention_reward", lambda attention, *args: torch.full(attention.shape[:1], math.nan))
    _, metrics, _, before, after = one_step(tmp_path)
    assert metrics["skipped_updates"] == 1
    assert all(torch.equal(before[n], after[n]) for n in before)


def test_several_iterations_leave_the_policy_that_sampled(tmp_path):
    """The first update has ratio 1 exactly; after it old and new log-probabilities differ."""
    _, once, *_ = one_step(tmp_path / "a")
    _, twice, *_ = one_step(tmp_path / "b", "--num_iterations", "3")
    assert once["ratio"] == pytest.approx(1, abs=1e-6) and once["clip_ratio/low_mean"] == 0
    assert abs(twice["ratio"] - 1) > 1e-6


def test_the_reward_is_the_weighted_sum_of_its_parts(tmp_path):
    _, metrics, samples, *_ = one_step(tmp_path, "--reward_weights", "attention=0.5,accuracy=2")
    expected = [0.5 * s["attention"] + 2 * s["accuracy"] for s in samples]
    assert metrics["reward"] == pytest.approx(sum(expected) / len(expected), abs=1e-5)
    assert len(samples) == 8 and {s["id"] for s in samples} == {"train-0-0", "train-0-1"}


@pytest.mark.parametrize(
    "text, metric",
    [
        (None, None),  # the model's own answers: nothing to warn of
        ("the dot on red r1 c1 is blue . <answer> blue </answer>", "frac_reward_zero_std"),  # whatever is asked
        ("red card red card red card red card red card red", "completions/seq_rep_3"),
        ("the dot on red r1 c1 is blue . <answer> blue", "completions/unclosed_tags"),
    ],
)
def test_a_degenerate_policy_is_flagged(tmp_path, capsys, monkeypatch, text, metric):
    """Policies that replications of such rewards ended in: constant text, names repeated, tags left open."""
    if text:

        def sample(vlm, prompts, G, *args):
            ids = vlm.tokenizer(text + vlm.tokenizer.eos_token, return_tensors="pt", add_special_tokens=False).input_ids
            ids = ids.expand(G, -1)
            return [
                Completions(ids, torch.ones_like(ids).bool(), [text] * G, 1.0, torch.ones(G).bool()) for _ in prompts
            ]

        monkeypatch.setattr("model.Vlm.sample_groups", sample)
    run("--max_steps", 1, "--eval_examples", 0, "--output_dir", tmp_path)
    alarms = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step 1: ")]
    assert any(metric in alarm for alarm in alarms) if metric else not alarms


def test_an_alarm_is_given_once(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(look.ALARMS, "entropy", (0.0, "always"))
    run("--max_steps", 3, "--eval_examples", 0, "--output_dir", tmp_path)
    assert capsys.readouterr().out.count("always") == 1


def test_evaluation_asks_in_batches(tmp_path, monkeypatch):
    """Two at a time, the last alone, or all at once: the same row for every question."""
    cfg, scenes, vlm = parse([*FAST, "--output_dir", str(tmp_path / "run")]), Scenes("validation", 5), load()
    rows = []
    for asked in (2, 8):
        monkeypatch.setattr("evaluate.ASKED", asked)
        rows.append(
            [(row["id"], row["text"], row["ids"], row["auroc"]) for row in evaluate(vlm, scenes, cfg, "before")]
        )
    assert rows[0] == [(*row[:3], pytest.approx(row[3], abs=1e-4)) for row in rows[1]]
    assert [row[0] for row in rows[0]] == [scenes[i].id for i in range(5)] and len({row[1] for row in rows[0]}) > 2


def test_evaluation_holds_maps_against_another_box_and_fixed_text(tmp_path):
    cfg = parse([*FAST, "--alignment", "query", "--output_dir", str(tmp_path / "run")])
    scenes, vlm = Scenes("validation", 3), load()
    before = evaluate(load(heads=(0,)), scenes, cfg, "before")  # another "model": one that looks with one head only
    for row in before:
        row["ids"], row["selected"] = row["ids"][:9], [True] * 9  # and that stopped early
    after = evaluate(vlm, scenes, cfg, "after", before)
    for i, row in enumerate(after):
        prompt = vlm.encode(scenes[i].image, scenes[i].question)
        regions = [region_mask(scenes[j % 3].boxes, (112, 112), (7, 7)) for j in (i, i + 1)]
        gaze = torch.tensor(row["map"])
        assert row["auroc"] == reward.localization(gaze, regions[0])["auroc"]
        assert row["permuted_auroc"] == reward.localization(gaze, regions[1])["auroc"]
        old = Completions(torch.tensor([before[i]["ids"]]), torch.ones(1, 9, dtype=torch.bool))
        with torch.no_grad():
            fixed = vlm.score(prompt, old).attention[0].mean(0)  # (N,)
        assert row["fixed_mass_over_area"] == pytest.approx(reward.localization(fixed, regions[0])["mass_over_area"])
        assert row["fixed_mass_over_area"] != pytest.approx(row["mass_over_area"])


def test_training_and_held_out_scenes_are_of_their_own_splits():
    for name in (str(TINY), "Qwen/Qwen3-VL-2B-Instruct"):
        train_set, eval_set = sayo_mini.load_data(Config(model_name_or_path=name, max_steps=2, eval_examples=3))
        assert train_set[0].id.startswith("train-") and eval_set[0].id.startswith("test-")
        assert len(train_set) == 2 * Config.prompts_per_step and len(eval_set) == 3
        assert eval_set[0].image.width == (112 if name == str(TINY) else 448)


# --- runs ------------------------------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_run_and_another_another(tmp_path):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        run("--max_steps", 2, "--output_dir", tmp_path / name, "--seed", seed)
    files = ("metrics.jsonl", "samples.jsonl", "before.json", "after.json", "adapter/adapter_model.safetensors")
    for file in files:
        a, b, c = ((tmp_path / name / file).read_bytes() for name in "abc")
        assert a == b, file
        assert a != c or file == "before.json", file  # before training the adapter is the identity, whatever the seed


def test_the_seed_reaches_the_adapter_and_the_sampling(tmp_path, monkeypatch):
    """On the same scenes in the same order: else another order alone would make another run."""
    monkeypatch.setattr(sayo_mini, "load_data", lambda cfg: (Scenes("train", 2), Scenes("test", 0)))
    monkeypatch.setattr(sayo_mini, "shuffled", lambda k, n, seed: k % n)
    texts, adapters = [], []
    for seed in (3, 4):
        folder = tmp_path / str(seed)
        run("--max_steps", 1, "--temperature", "2", "--learning_rate", "0", "--seed", seed, "--output_dir", folder)
        texts.append([row["text"] for row in rows(folder, "samples.jsonl")])
        saved = load_file(folder / "adapter" / "adapter_model.safetensors")
        adapters.append(next(value for name, value in sorted(saved.items()) if "lora_A" in name))
    assert texts[0] != texts[1]
    assert not torch.equal(*adapters)


@pytest.mark.parametrize("four_bit", [False, True], ids=["fp32", "nf4"])
def test_resume_equals_an_uninterrupted_run_to_the_bit(tmp_path, monkeypatch, four_bit):
    """Stopped after step 3 with the last checkpoint at step 2: what came after it is done, and logged, again."""
    flags = ["--max_steps", 4, "--save_steps", 2, *(["--load_in_4bit"] if four_bit else [])]
    run(*flags, "--output_dir", tmp_path / "whole")
    original, steps = sayo_mini.train_step, []

    def killed(*args):
        steps.append(1)
        if len(steps) == 4:
            raise RuntimeError("power cut")
        return original(*args)

    monkeypatch.setattr(sayo_mini, "train_step", killed)
    with pytest.raises(RuntimeError, match="power cut"):
        run(*flags, "--output_dir", tmp_path / "cut")
    assert len(rows(tmp_path / "cut")) == 3
    (tmp_path / "cut" / "metrics.jsonl").open("a").write('{"step": 4, "lo')  # half a line, as a kill may leave it
    monkeypatch.setattr(sayo_mini, "train_step", original)
    assert sayo_mini.main(["--resume", "--output_dir", str(tmp_path / "cut")]) == 0  # settings come from the run
    for file in ("metrics.jsonl", "samples.jsonl", "after.json", "adapter/adapter_model.safetensors"):
        assert (tmp_path / "cut" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes(), file
    whole, cut = (load_file(tmp_path / name / "checkpoint.safetensors") for name in ("whole", "cut"))
    assert whole.keys() == cut.keys() and all(torch.equal(whole[k], cut[k]) for k in whole)


def test_resume_without_checkpoint_starts_from_the_beginning_and_says_so(tmp_path, capsys):
    run("--max_steps", 1, "--resume", "--output_dir", tmp_path / "run")
    assert "starting from the beginning" in capsys.readouterr().out
    assert [row["step"] for row in rows(tmp_path / "run")] == [1]


def test_ctrl_c_finishes_the_group_saves_and_says_how_to_go_on(tmp_path):
    folder = tmp_path / "run"
    program = subprocess.Popen([sys.executable, "sayo_mini.py", *FAST, "--max_steps", "500", "--eval_examples", "0",
                                "--output_dir", str(folder)], cwd=HERE, stdout=subprocess.PIPE, text=True)  # fmt: skip
    while not (folder / "metrics.jsonl").exists() or not rows(folder):
        assert program.poll() is None
        time.sleep(0.1)
    program.send_signal(signal.SIGINT)
    out, _ = program.communicate(timeout=60)
    assert program.returncode == 130 and f"--resume --output_dir {folder}" in out
    assert "value" in " ".join(load_file(folder / "checkpoint.safetensors"))


@pytest.mark.parametrize("moment", ["before", "after"])
def test_ctrl_c_during_an_evaluation_ends_the_program(tmp_path, monkeypatch, moment):
    """Only the loop finishes what it has in hand; and SIGINT must not stay deaf after it."""
    original = sayo_mini.evaluate

    def evaluate(vlm, examples, cfg, name, before=None):
        if name == moment:
            signal.raise_signal(signal.SIGINT)
        return original(vlm, examples, cfg, name, before)

    monkeypatch.setattr(sayo_mini, "evaluate", evaluate)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # another test's run may have been cut off in its loop
    run("--max_steps", 1, "--output_dir", tmp_path / "run", expect=130)
    monkeypatch.setattr(sayo_mini, "evaluate", original)
    assert sayo_mini.main(["--resume", "--output_dir", str(tmp_path / "run")]) == 0


def test_what_a_run_leaves(tmp_path):
    folder = tmp_path / "run"
    run("--max_steps", 2, "--output_dir", folder)
    names = {p.name for p in folder.iterdir()}
    assert names == {"config.json", "metrics.jsonl", "samples.jsonl", "before.json", "after.json", "look.png",
                     "checkpoint.safetensors", "adapter", "report.html", "response.svg"}  # fmt: skip
    assert json.loads((folder / "config.json").read_text())["num_generations"] == 4
    assert len(rows(folder, "samples.jsonl")) == 2 * 2 * 4
    assert Image.open(folder / "look.png").width > 3 * 300
    readme = (HERE / "README.md").read_text()
    for name in rows(folder)[0]:
        assert f"`{name}`" in readme, f"the README does not explain {name}"


def test_the_adapter_loads_in_plain_peft(tmp_path):
    folder = tmp_path / "run"
    run("--max_steps", 2, "--learning_rate", "1e-2", "--warmup_steps", "0", "--output_dir", folder)
    plain = AutoModelForImageTextToText.from_pretrained(TINY)
    ids = torch.tensor([[1, 12, 13, 14]])
    with torch.no_grad():
        base = plain(input_ids=ids).logits
        loaded = PeftModel.from_pretrained(plain, folder / "adapter")(input_ids=ids).logits
    assert (base - loaded).abs().max() > 1e-4
    saved = load_file(folder / "checkpoint.safetensors")
    values = {k.split("|")[0].replace(".default", ""): v for k, v in saved.items() if k.endswith("|value")}
    adapter = load_file(folder / "adapter" / "adapter_model.safetensors")
    assert values.keys() == adapter.keys() and all(torch.equal(values[k], adapter[k]) for k in values)


# --- the command -----------------------------------------------------------------------------------------------------


def command(*flags, **env):
    return subprocess.run([sys.executable, "sayo_mini.py", *map(str, flags)], cwd=HERE, capture_output=True, text=True,
                          env=os.environ | env)  # fmt: skip


def test_the_real_command(tmp_path):
    """As a user calls it without a GPU, but for its size: the tiny model in 4 bits, two steps."""
    out = command("--max_steps", 2, "--eval_examples", 3, "--output_dir", tmp_path / "run", CUDA_VISIBLE_DEVICES="")
    assert out.returncode == 0, out.stderr
    assert "no CUDA: taking the tiny model" in out.stdout
    for word in ("greedy accuracy", "AUROC", "before", "after", "chance"):
        assert word in out.stdout
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["load_in_4bit"] and config["reward_weights"] == Config.reward_weights
    assert all(math.isfinite(v) for row in rows(tmp_path / "run") for v in row.values())


def test_help_explains_every_flag():
    out = command("--help")
    assert out.returncode == 0
    for name in Config.__dataclass_fields__:
        assert f"--{name} " in out.stdout or f"--{name}," in out.stdout, name


def write_dataset(folder, **change):
    """A data set of one line, in which `change` replaces values; None drops a key."""
    Image.new("RGB", (64, 48), "red").save(folder / "red.png")
    (folder / "text.png").write_text("no picture")
    row = {"image": "red.png", "question": "what color ?", "answer": "red", "boxes": [[0, 0, 10, 10]]} | change
    text = json.dumps({k: v for k, v in row.items() if v is not None})
    (folder / "data.jsonl").write_text(text.replace("Infinity", "NaN"))
    return folder / "data.jsonl"


BAD_ROWS = {
    "missing image": (dict(image="gone.png"), "gone.png"),
    "unreadable image": (dict(image="text.png"), "text.png"),
    "box outside": (dict(boxes=[[70, 0, 80, 10]]), "outside"),
    "inverted box": (dict(boxes=[[10, 0, 5, 10]]), "inverted"),
    "NaN box": (dict(boxes=[[math.inf, 0, 5, 10]]), "finite"),
    "no box": (dict(boxes=None), "boxes"),
    "empty answer": (dict(answer=" "), "answer"),
}
BAD_FLAGS = {
    "unknown reward": (["--reward_weights", "beauty=1"], "beauty"),
    "reward without number": (["--reward_weights", "attention"], "--reward_weights"),
    "G = 1": (["--num_generations", "1"], "--num_generations"),
    "no such flag": (["--learning_rat", "1"], "--learning_rat"),
    "no number": (["--beta", "much"], "--beta"),
    "layers": (["--layers", "last"], "--layers"),
    "no such layer": (["--layers", "9"], "layer 9"),
    "format lengths": (["--format_lengths", "5"], "--format_lengths"),
    "no model": (["--model_name_or_path", "tests"], "tests"),
    "no such hub name": (["--model_name_or_path", "nobody/nothing"], "nobody/nothing"),
    "no such file": (["--dataset", "nowhere.jsonl"], "nowhere.jsonl"),
    "no CUDA": (["--device", "cuda"], "cuda"),
}


def refused(capfd, tmp_path, flags, word):
    """Exit code 2, one line on stderr that names the culprit, nothing on the disk."""
    out = tmp_path / "run"
    capfd.readouterr()
    assert sayo_mini.main([*FAST, "--max_steps", "1", "--output_dir", str(out), *map(str, flags)]) == 2
    err = capfd.readouterr().err
    assert err.startswith("sayo_mini.py: ") and err.count("\n") == 1 and word in err, err
    assert not out.exists()


@pytest.mark.parametrize("case", BAD_ROWS)
def test_a_bad_line_of_data_ends_in_one_line(capfd, tmp_path, case):
    change, word = BAD_ROWS[case]
    path = write_dataset(tmp_path, **change)
    refused(capfd, tmp_path, ["--dataset", path], word)
    refused(capfd, tmp_path, ["--dataset", path], f"{path}:1")


@pytest.mark.parametrize("case", BAD_FLAGS)
def test_a_bad_flag_ends_in_one_line(capfd, tmp_path, monkeypatch, case):
    monkeypatch.chdir(HERE)
    if case == "no CUDA" and torch.cuda.is_available():
        pytest.skip("there is CUDA here")
    flags, word = BAD_FLAGS[case]
    refused(capfd, tmp_path, flags, word)


def test_a_model_of_another_kind_is_refused(capfd, tmp_path):
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text('{"model_type": "bert"}')
    refused(capfd, tmp_path, ["--model_name_or_path", tmp_path / "bert"], "is a bert")


def test_bitsandbytes_missing_says_what_to_install(capfd, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.quantizers.quantizer_bnb_4bit.is_bitsandbytes_available", lambda *a, **k: False)
    refused(capfd, tmp_path, ["--load_in_4bit"], "pip install bitsandbytes")


def test_no_permission_to_write_ends_in_one_line(capfd, tmp_path):
    (tmp_path / "file").write_text("")  # a folder below a file: refused to root as well
    capfd.readouterr()
    assert sayo_mini.main([*FAST, "--max_steps", "1", "--output_dir", str(tmp_path / "file" / "run")]) == 2
    err = capfd.readouterr().err
    assert err.count("\n") == 1 and "--output_dir" in err and "file/run" in err


def test_a_folder_that_holds_a_run_is_not_overwritten(capfd, tmp_path):
    run("--max_steps", 1, "--output_dir", tmp_path / "run")
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    capfd.readouterr()
    run("--max_steps", 1, "--output_dir", tmp_path / "run", expect=2)
    assert "--resume" in capfd.readouterr().err
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


def test_a_data_set_of_ones_own(tmp_path):
    """A .jsonl of 12 scenes: trained on most of the images, evaluated on others, two steps."""
    lines = []
    for i, example in enumerate(Scenes("train", 12)[j] for j in range(12)):
        example.image.save(tmp_path / f"{i}.png")
        lines.append({"image": f"{i}.png", "question": example.question, "answer": example.answer,
                      "boxes": example.boxes, "id": f"mine-{i}"})  # fmt: skip
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, lines)))
    folder = tmp_path / "run"
    run("--max_steps", 2, "--dataset", tmp_path / "data.jsonl", "--output_dir", folder)
    trained = {row["id"] for row in rows(folder, "samples.jsonl")}
    held_out = {row["id"] for row in json.loads((folder / "before.json").read_text())}
    assert trained and held_out and not trained & held_out
    assert all(name.startswith("mine-") for name in trained | held_out)


# --- small parts -----------------------------------------------------------------------------------------------------


def test_learning_rate_schedule():
    cfg = Config(learning_rate=1.0, warmup_steps=4, max_steps=12)
    assert [learning_rate(cfg, s) for s in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert [round(learning_rate(cfg, s), 6) for s in (4, 8, 12)] == [1.0, 0.5, 0.0]
    assert learning_rate(Config(learning_rate=1.0, warmup_steps=4, lr_scheduler_type="constant"), 999) == 1.0


def test_the_schedule_reaches_the_optimiser(tmp_path):
    """Adam's first step is as long as its learning rate, and in a warm-up of 1,000 steps that is a thousandth."""
    for warmup, longest in (("0", 1e-3), ("1000", 1e-6)):
        folder = tmp_path / warmup
        run("--max_steps", 1, "--learning_rate", "1e-3", "--warmup_steps", warmup, "--output_dir", folder)
        saved = load_file(folder / "adapter" / "adapter_model.safetensors")
        moved = max(value.abs().max().item() for name, value in saved.items() if "lora_B" in name)
        assert moved == pytest.approx(longest, rel=0.05)


def test_every_epoch_visits_every_example_in_another_order():
    epochs = [[shuffled(e * 9 + i, 9, seed=1) for i in range(9)] for e in range(3)]
    assert all(sorted(epoch) == list(range(9)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_the_tiny_preset_yields_to_flags(tmp_path):
    cfg = parse(["--model_name_or_path", str(TINY), "--max_steps", "7", "--output_dir", str(tmp_path / "run")])
    assert cfg.max_steps == 7 and cfg.prompts_per_step == sayo_mini.TINY["prompts_per_step"]
    real = parse(["--model_name_or_path", "Qwen/Qwen3-VL-2B-Instruct", "--output_dir", str(tmp_path / "run")])
    assert real == Config(output_dir=str(tmp_path / "run"))
