"""The training loop: one step, whole runs, precision, and output that is not finite."""

import json
import math
import os
import shlex
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import TINY, ask, load
from PIL import Image
from safetensors.torch import load_file, save_file

import model
import reward
import sayo_mini
from checkpoint import load_checkpoint, run_config
from config import Config, parse_command_line
from data import load_datasets
from metrics import ALARMS
from model import Completions
from sayo_mini import learning_rate, train_step
from scenes import Scenes

ROOT = Path(__file__).parent.parent
FAST = "--device cpu --no-load_in_4bit --prompts_per_step 2 --num_generations 4".split()
FAST += "--eval_examples 2 --max_completion_length 20 --model_name_or_path".split() + [str(TINY)]


def run(folder, flags="", expect=0):
    """Run the program in this process; check the exit code."""
    argv = [*FAST, "--output_dir", str(folder), *shlex.split(flags)]
    assert sayo_mini.main(argv) == expect


def run_process(*flags, **env):
    """Run the real command in its own process with only these flags."""
    return subprocess.run(
        [sys.executable, "sayo_mini.py", *map(str, flags)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | env,
    )


def refuse_constant(name):
    raise AssertionError(f"{name} is not JSON")


def read_log(folder, name="metrics.jsonl"):
    """The rows of a log, parsed as strict JSON: without NaN and Infinity, which Python accepts."""
    lines = (folder / name).read_text().splitlines()
    return [json.loads(line, parse_constant=refuse_constant) for line in lines]


def load_trained_adapter(folder):
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def make_config(tmp_path, flags=""):
    argv = [*FAST, "--output_dir", str(tmp_path / "run"), *shlex.split(flags)]
    return run_config(parse_command_line(argv)[1])


def copy_parameters(vlm):
    return {name: p.detach().clone() for name, p in vlm.model.named_parameters()}


def make_adamw(vlm):
    params = [p for p in vlm.model.parameters() if p.requires_grad]
    return torch.optim.AdamW(params, lr=1e-3, weight_decay=0)


def make_step(vlm, cfg, optimizer, count=2):
    """Run `train_step` on the first `count` training scenes. Returns: (metrics, samples)."""
    scenes = Scenes("train", 8)
    examples = [scenes[i] for i in range(count)]
    return train_step(vlm, examples, cfg, optimizer, torch.Generator().manual_seed(0))


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

    def score_and_reward(vlm, groups, scores, cfg):
        packed_lengths.extend(len(g.prompt.input_ids) + g.completions.ids.numel() for g in groups)
        return original(vlm, groups, scores, cfg)

    monkeypatch.setattr(sayo_mini, "score_and_reward", score_and_reward)
    vlm = load()
    counts = record_forward_tokens(vlm)
    cfg = make_config(tmp_path, f"--beta {beta} --temperature 2")
    metrics, _ = make_step(vlm, cfg, make_adamw(vlm))
    assert metrics["frac_reward_zero_std"] == 0  # a skipped group would make the count too low
    assert len(packed_lengths) == 2
    total = sum(packed_lengths)
    assert (forwards - 1) * total < sum(counts) <= forwards * total


@pytest.mark.parametrize("at_once, batch_sizes", [(64, [3]), (9, [2, 1]), (1, [1, 1, 1])])
def test_questions_are_sampled_in_batches(tmp_path, monkeypatch, at_once, batch_sizes):
    """There are three questions with four completions each."""
    vlm, sizes = load(), []
    original = vlm._sample

    def sample(prompts, *args):
        sizes.append(len(prompts))
        return original(prompts, *args)

    monkeypatch.setattr(vlm, "_sample", sample)
    monkeypatch.setattr(model, "SAMPLED_AT_ONCE", at_once)
    _, samples = make_step(vlm, make_config(tmp_path), make_adamw(vlm), count=3)
    assert sizes == batch_sizes
    assert [s["id"] for s in samples] == [f"train-0-{i}" for i in range(3) for _ in range(4)]


def test_splitting_a_group_changes_only_memory(tmp_path):
    """One forward for both groups, one for each, and one for each completion lead to the same
    update; a different beta does not. All tokens count and the completions vary, because otherwise
    rounding would decide which entropy near 0 is the highest, and would be divided by a tiny
    standard deviation."""
    flags = "--token_fraction 1 --temperature 2 --beta"
    *_, whole = step_and_compare(tmp_path / "a", f"{flags} 0.5")
    split_flags = f"{flags} 0.5 --completions_per_forward 1"
    *_, split = step_and_compare(tmp_path / "b", split_flags, completions_per_forward=1)
    packed_flags = f"{flags} 0.5 --completions_per_forward 8"
    *_, packed = step_and_compare(tmp_path / "d", packed_flags, completions_per_forward=8)
    *_, other_beta = step_and_compare(tmp_path / "c", f"{flags} 0")

    def largest_difference(parameters):
        names = [name for name in whole if "lora" in name]
        return max((whole[name] - parameters[name]).abs().max().item() for name in names)

    assert largest_difference(split) < 1e-5 and largest_difference(packed) < 1e-5
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
    monkeypatch.setattr("data.epoch_index", lambda k, n, seed: k % n)
    texts, adapters = [], []
    for seed in (3, 4):
        folder = tmp_path / str(seed)
        run(folder, f"--max_steps 1 --temperature 2 --learning_rate 0 --seed {seed}")
        texts.append([row["text"] for row in read_log(folder, "samples.jsonl")])
        saved = sorted(load_trained_adapter(folder).items())
        adapters.append(next(value for name, value in saved if "lora_A" in name))
    assert texts[0] != texts[1]
    assert not torch.equal(*adapters)


def test_files_of_a_run(tmp_path):
    folder = tmp_path / "run"
    run(folder, "--max_steps 2")
    names = "config.json metrics.jsonl samples.jsonl before.json after.json look.png report.html"
    names += " checkpoint.safetensors adapter timing.jsonl lock"
    names += " look.gif before_after.png"
    assert {path.name for path in folder.iterdir()} == set(names.split())
    assert json.loads((folder / "config.json").read_text())["num_generations"] == 4
    assert len(read_log(folder, "samples.jsonl")) == 2 * 2 * 4
    assert Image.open(folder / "look.png").width > 3 * 300
    explained = (ROOT / "docs" / "logging.md").read_text()
    for name in read_log(folder)[0]:
        assert f"`{name}`" in explained, f"docs/logging.md does not explain {name}"


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


@pytest.mark.slow
def test_command_prints_no_warning(tmp_path):
    """transformers logs no warning either: stderr contains only the progress bars."""
    process = run_process(*FAST, "--max_steps", 1, "--output_dir", tmp_path)
    assert process.returncode == 0
    lines = process.stderr.replace("\r", "\n").splitlines()
    assert [
        line for line in lines if line.strip() and "/s" not in line and "s/it" not in line
    ] == []


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


# --- precision ---

LOAD_VLM = model.load_vlm


def gradient(dtype):
    """The gradient of one step's loss with fixed advantages, as one vector in fp64."""
    vlm = load(dtype=dtype)
    prompt, completions = ask(load(), G=4, C=12)
    A, mask = torch.tensor([1.0, -1.0, 0.5, -0.5]), completions.mask
    logps = vlm.score(prompt, completions).logps
    reward.grpo_loss(logps, logps.detach(), None, A, mask)[0].backward()
    trained = [p for p in vlm.model.parameters() if p.requires_grad]
    return torch.cat([p.grad.flatten() for p in trained]).double()


@pytest.mark.parametrize("dtype, cosine", [(torch.bfloat16, 0.95), (torch.float16, 0.999)])
def test_gradients_are_close_to_fp32(dtype, cosine):
    """The bounds are loose: the cosines were 0.99 and 0.99999 on several processors."""
    expected, found = gradient(torch.float32), gradient(dtype)
    assert torch.cosine_similarity(expected, found, 0) > cosine
    assert (found.norm() / expected.norm()).item() == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_adapter_and_scores_stay_in_fp32(dtype):
    vlm = load(dtype=dtype)
    assert vlm.dtype == dtype
    scores = vlm.score(*ask(vlm))
    scores.logps.sum().backward()
    trained = [p for p in vlm.model.parameters() if p.requires_grad]
    assert {p.dtype for p in trained} == {p.grad.dtype for p in trained} == {torch.float32}
    kept = scores.logps, scores.entropy, scores.attention, scores.prompt_attention
    assert {tensor.dtype for tensor in kept} == {torch.float32}


# --- the loss scale of fp16 ---


def small_gradient(dtype, loss_scale):
    """The gradient of a loss of about 1e-6, as one vector in fp64."""
    vlm = load(dtype=dtype)
    prompt, completions = ask(vlm, G=4, C=12)
    completions.ids.copy_(
        torch.arange(completions.ids.numel()).view(completions.ids.shape) % 40 + 10
    )
    loss = vlm.score(prompt, completions).logps.sum() * 1e-8
    scaler = torch.amp.GradScaler("cpu", init_scale=loss_scale, enabled=loss_scale > 1)
    scaler.scale(loss).backward()
    trained = [p for p in vlm.model.parameters() if p.requires_grad]
    return torch.cat([p.grad.flatten() for p in trained]).double() / loss_scale


def test_small_gradients_need_the_loss_scale():
    """fp16 has no positive numbers below 6e-8, so without a loss scale such a gradient is 0."""

    def cosine(a, b):
        return (a @ b / (a.norm() * b.norm()).clamp(min=1e-30)).item()

    expected = small_gradient(torch.float32, 1)
    assert cosine(small_gradient(torch.float16, 1), expected) < 0.9
    assert cosine(small_gradient(torch.float16, 2.0**10), expected) > 0.99


@pytest.fixture
def fp16(monkeypatch):
    """Make every model of a run compute in fp16."""
    monkeypatch.setattr(model, "load_vlm", partial(LOAD_VLM, dtype=torch.float16))


def loss_scale(folder):
    """The loss scale in the newest checkpoint, or None if it has none."""
    state, _ = load_checkpoint(folder / "checkpoint.safetensors")
    return state["scaler"].get("scale")


def test_only_fp16_has_a_loss_scale(tmp_path, fp16, monkeypatch):
    run(tmp_path / "fp16", "--max_steps 1 --eval_examples 0")
    assert loss_scale(tmp_path / "fp16") == 2**10
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        monkeypatch.setattr(model, "load_vlm", partial(LOAD_VLM, dtype=dtype))
        run(tmp_path / name, "--max_steps 1 --eval_examples 0")
        assert loss_scale(tmp_path / name) is None


def overflow_at_steps(monkeypatch, steps):
    """Make the scaled loss of these steps too large for the type of the gradient."""
    original, calls = sayo_mini.train_step, []

    def train_step(*args):
        calls.append(1)
        large = len(calls) in steps
        scale = torch.amp.GradScaler.scale
        with monkeypatch.context() as patch:
            if large:
                patch.setattr(
                    torch.amp.GradScaler, "scale", lambda self, loss: scale(self, loss) * 1e30
                )
            return original(*args)

    monkeypatch.setattr(sayo_mini, "train_step", train_step)


def test_overflow_halves_the_loss_scale_and_skips_the_update(tmp_path, fp16, monkeypatch):
    overflow_at_steps(monkeypatch, {2, 3})
    run(tmp_path, "--max_steps 4 --eval_examples 0")
    rows = read_log(tmp_path)
    assert [row["skipped_updates"] for row in rows] == [0, 1, 1, 0]
    assert rows[1]["grad_norm"] is None and rows[3]["grad_norm"] > 0
    assert loss_scale(tmp_path) == 2**8


def test_ten_overflows_in_a_row_stop_the_run(tmp_path, fp16, monkeypatch, capsys):
    overflow_at_steps(monkeypatch, range(2, 99))
    run(tmp_path, "--max_steps 20 --eval_examples 0", expect=2)
    err = capsys.readouterr().err.splitlines()[-1]
    assert "stopped after step 11" in err and "in 10 updates in a row" in err
    assert len(read_log(tmp_path)) == 11


def test_step_without_gradient_keeps_the_loss_scale(tmp_path, fp16):
    """All rewards are equal, so there is no backward pass that could overflow."""
    run(tmp_path, "--max_steps 2 --eval_examples 0 --reward_weights format=1e-9,attention=0")
    assert loss_scale(tmp_path) == 2**10
    assert [row["skipped_updates"] for row in read_log(tmp_path)] == [0, 0]


@pytest.mark.slow
def test_resumed_fp16_run_equals_an_uninterrupted_one(tmp_path, fp16, monkeypatch):
    """The checkpoint is saved after an overflow, and the run resumes with the halved scale."""
    flags = "--max_steps 4 --save_steps 2 --eval_examples 2"
    overflow_at_steps(monkeypatch, {2})
    run(tmp_path / "whole", flags)
    monkeypatch.undo()
    monkeypatch.setattr(model, "load_vlm", partial(LOAD_VLM, dtype=torch.float16))
    overflow_at_steps(monkeypatch, {2})
    original, steps = sayo_mini.train_step, []

    def killed(*args):
        steps.append(1)
        if len(steps) == 3:
            raise RuntimeError("power cut")
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(sayo_mini, "train_step", killed)
        with pytest.raises(RuntimeError, match="power cut"):
            run(tmp_path / "cut", flags)
    assert loss_scale(tmp_path / "cut") == 2**9
    overflow_at_steps(monkeypatch, set())
    assert sayo_mini.main(["--resume", "--output_dir", str(tmp_path / "cut")]) == 0
    for file in ("metrics.jsonl", "samples.jsonl", "after.json", "checkpoint.safetensors"):
        whole, cut = ((tmp_path / name / file) for name in ("whole", "cut"))
        if file.endswith("json") or file.endswith("jsonl"):
            assert whole.read_bytes() == cut.read_bytes(), file
        else:
            a, b = load_file(whole), load_file(cut)
            assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# --- non-finite output ---


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_sampling_passes_nan_on(monkeypatch, temperature):
    """torch.multinomial would raise an error, and on CUDA the process could then no longer use the
    card. The other completions of the batch are the same as without the NaN."""
    vlm = load()
    _, expected = ask(vlm, temperature=temperature)
    original = vlm._logits

    def nan_in_row_0(hidden, *args):
        logits = original(hidden, *args)
        logits[0] = math.nan
        return logits

    monkeypatch.setattr(vlm, "_logits", nan_in_row_0)
    _, found = ask(vlm, temperature=temperature)
    for row in (1, 2, 3):
        length = expected.mask[row].sum()
        assert torch.equal(found.ids[row][:length], expected.ids[row][:length])
    assert found.ids.min() >= 0 and found.ids.max() < vlm.core.config.text_config.vocab_size


def test_sampling_draws_what_multinomial_draws():
    """Both draw the same tokens from the same random numbers, at tiny and real vocabulary sizes."""
    for rows, vocabulary in ((64, 64), (8, 9216), (4, 151936)):
        p = torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(1)).softmax(-1)
        p[:, 3:7] = 0
        a, b = (torch.Generator().manual_seed(2) for _ in "ab")
        token = (p / torch.empty_like(p).exponential_(generator=a)).argmax(-1)
        assert torch.equal(token, torch.multinomial(p, 1, generator=b)[:, 0])
        assert torch.equal(a.get_state(), b.get_state())


def nan_after_calls(monkeypatch, calls, module="layers.0"):
    """Make the output of this language-model module NaN after this many calls."""
    counter = []

    def hook(module, args, out):
        counter.append(1)
        return out * math.nan if len(counter) > calls else out

    def load_vlm(*args, **settings):
        vlm = LOAD_VLM(*args, **settings)
        vlm.core.model.language_model.get_submodule(module).register_forward_hook(hook)
        return vlm

    monkeypatch.setattr(model, "load_vlm", load_vlm)


def assert_one_line(capfd, word):
    err = [line for line in capfd.readouterr().err.splitlines() if line.startswith("sayo_mini.py")]
    assert len(err) == 1 and word in err[0], err
    return err[0]


def test_nan_during_training_stops_after_ten_skipped_updates(tmp_path, monkeypatch, capfd):
    """Each skipped step is logged with its samples as JSON, and no half-written file remains."""
    nan_after_calls(monkeypatch, 6)  # in the second or third step
    run(tmp_path, "--max_steps 30 --eval_examples 0", expect=2)
    assert_one_line(capfd, "not finite in 10 updates in a row")
    rows, samples = read_log(tmp_path), read_log(tmp_path, "samples.jsonl")
    skipped = [row["skipped_updates"] for row in rows]
    assert skipped[0] == 0 and skipped[-10:] == [1] * 10
    assert rows[-1]["loss"] is None and rows[-1]["attention/auroc"] is None
    assert len(samples) == 8 * len(rows) and samples[-1]["attention"] is None
    assert not list(tmp_path.glob("unfinished-*"))


def test_run_with_skipped_updates_ends_with_a_report(tmp_path, monkeypatch):
    """All completions and therefore all rewards are equal in the skipped steps, but the NaN
    log-probabilities still skip the update."""
    nan_after_calls(monkeypatch, 6, module="norm")  # in the second or third step
    run(tmp_path, "--max_steps 4 --eval_examples 0")
    skipped = [row["skipped_updates"] for row in read_log(tmp_path)]
    assert skipped[0] == 0 and skipped[-1] == 1
    assert "NaN" not in (tmp_path / "report.html").read_text()


@pytest.fixture
def nan_model(tmp_path):
    """The path of a model folder whose last norm is NaN."""
    folder = tmp_path / "nan"
    folder.mkdir()
    for path in TINY.iterdir():
        if path.is_file():
            (folder / path.name).write_bytes(path.read_bytes())
    weights = load_file(folder / "model.safetensors")
    (name,) = [name for name in weights if name.endswith("language_model.norm.weight")]
    weights[name].fill_(math.nan)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


def test_nan_in_evaluation_is_a_one_line_error(tmp_path, nan_model, capfd):
    flags = f"--max_steps 1 --eval_examples 2 --model_name_or_path {nan_model}"
    run(tmp_path / "run", flags, expect=2)
    assert "--no-load_in_4bit" in assert_one_line(capfd, "output is not finite")
    assert not (tmp_path / "run" / "before.json").exists()
    assert not list((tmp_path / "run").glob("unfinished-*"))


def test_nan_in_look_and_probe_is_a_one_line_error(tmp_path, nan_model, capfd):
    model_flags = ["--model_name_or_path", nan_model, "--no-load_in_4bit", "--device", "cpu"]
    picture = tmp_path / "look.png"
    image = tmp_path / "card.png"
    Scenes("validation", 1)[0].image.save(image)
    look = ["look", "--image", str(image), "--question", "what color ?", "--output", str(picture)]
    assert sayo_mini.main([*look, *model_flags]) == 2
    assert_one_line(capfd, "output is not finite")
    assert not picture.exists()
    probe = ["probe", "--eval_examples", "2", "--output_dir", str(tmp_path / "probe")]
    assert sayo_mini.main([*probe, *model_flags]) == 2
    assert_one_line(capfd, "output is not finite")
    assert not (tmp_path / "probe" / "probe.png").exists()
