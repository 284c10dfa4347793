"""The training loop: one step, whole runs, precision, and output that is not finite."""

import json
import math
from functools import partial
from unittest.mock import patch

import pytest
import torch
from conftest import FAST, ROOT, adapter_weights, error_line, load, read_log, run_program, trained

import model
import reward
import sayo_mini
from checkpoint import load_checkpoint, run_config
from config import Config, parse_command_line
from sayo_mini import learning_rate, train_step
from scenes import Scenes

DATASET = ROOT / "example" / "example.jsonl"


def run(folder, flags="", expect=0):
    run_program(folder, f"--eval_examples 2 --max_completion_length 20 {flags}", expect)


def make_step(flags="", vlm=None, count=2):
    """One step on the first training scenes, with plain SGD, because Adam would scale up even a
    tiny gradient. Returns: (metrics, the names of the parameters that changed)."""
    vlm, argv = vlm or load(), [*FAST, "--max_completion_length", "20", *flags.split()]
    cfg = run_config(parse_command_line([*argv, "--output_dir", "none"])[1])
    before = {name: p.detach().clone() for name, p in vlm.model.named_parameters()}
    optimizer = torch.optim.SGD(trained(vlm).values(), 0.1)
    examples = [Scenes("train", 8)[i] for i in range(count)]
    metrics, _ = train_step(vlm, examples, cfg, optimizer, torch.Generator().manual_seed(0))
    after = dict(vlm.model.named_parameters())
    return metrics, {n for n in before if not torch.equal(before[n], after[n])}


# --- one step ---


def test_fewer_questions_are_sampled_at_once_when_memory_runs_out(capsys):
    """Also in later steps. One question alone cannot be split."""
    vlm, sizes, most = load(), [], 2
    sample = vlm._sample

    def limited(prompts, *args):
        sizes.append(len(prompts))
        if len(prompts) > most:
            raise torch.OutOfMemoryError
        return sample(prompts, *args)

    with patch.object(vlm, "_sample", limited):
        make_step(vlm=vlm, count=4)
        make_step(vlm=vlm, count=4)
        assert sizes == [4, 2, 2, 2, 2]
        assert "fewer than 4 questions at once" in "".join(capsys.readouterr())
        most = 0
        with pytest.raises(torch.OutOfMemoryError):
            make_step(vlm=vlm)


@pytest.mark.parametrize("beta", [0.5, 0.0])
@pytest.mark.parametrize("per_forward, batches", [(0, [1, 1, 1]), (2, [1, 1, 1]), (9, [2, 1])])
def test_groups_are_packed_into_forwards(per_forward, batches, beta):
    """Up to two of the three groups fit in a forward. For equal results see test_scale_trl.py."""
    vlm = load(completions_per_forward=per_forward)
    flags = f"--completions_per_forward {per_forward} --beta {beta} --temperature 2"
    with patch.object(vlm, "score_groups", wraps=vlm.score_groups) as score:
        make_step(f"{flags} --token_fraction 1", vlm, 3)
    passes = ("policy", "reference") if beta else ("policy",)
    sizes = [len(call.args[0]) for call in score.call_args_list]
    assert sizes == [size for size in batches for _ in passes]


def test_group_without_variance_is_skipped_and_counted():
    """With this weight all rewards are equal, so there is no update and no division by 0."""
    metrics, changed = make_step("--reward_weights format=1e-12")
    assert metrics["frac_reward_zero_std"] == 1 and not changed
    assert metrics["grad_norm"] == 0 and metrics["loss"] == 0


def nan_reward(attention, *args):
    return torch.full(attention.shape[:1], math.nan)


def infinite_loss(*args, original=reward.grpo_loss, **settings):
    loss, stats = original(*args, **settings)
    return loss + math.inf, stats  # the gradient is finite


@pytest.mark.parametrize(
    "name, function", [("attention_reward", nan_reward), ("grpo_loss", infinite_loss)]
)
def test_update_that_is_not_finite_is_skipped_and_counted(monkeypatch, name, function):
    monkeypatch.setattr(reward, name, function)
    metrics, changed = make_step("--temperature 2")
    assert metrics["skipped_updates"] == 1 and not changed
    assert math.isfinite(metrics["grad_norm"]) == (name == "grpo_loss")


# --- runs ---


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
        saved = adapter_weights(folder)
        adapters.append(next(saved[name] for name in sorted(saved) if "lora_A" in name))
    assert texts[0] != texts[1] and not torch.equal(*adapters)


def test_a_run_on_your_own_data_writes_its_files_and_holds_images_out(tmp_path):
    run(tmp_path, f"--max_steps 2 --eval_examples 1 --dataset {DATASET}")
    names = "config.json metrics.jsonl samples.jsonl before.json after.json look.png report.html "
    names += "checkpoint.safetensors adapter timing.jsonl lock look.gif before_after.png"
    assert {path.name for path in tmp_path.iterdir()} == set(names.split())
    assert json.loads((tmp_path / "config.json").read_text())["num_generations"] == 4
    samples = read_log(tmp_path, "samples.jsonl")
    assert len(samples) == 2 * 2 * 4
    used = {row["id"] for row in samples}
    held_out = {row["id"] for row in json.loads((tmp_path / "before.json").read_text())}
    assert len(used) == 2 and len(held_out) == 1 and not used & held_out


def test_learning_rate_schedule():
    cfg = Config(learning_rate=1.0, warmup_steps=4, max_steps=12)
    assert [learning_rate(cfg, step) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert [round(learning_rate(cfg, step), 6) for step in (4, 8, 12)] == [1.0, 0.5, 0.0]
    constant = Config(learning_rate=1.0, warmup_steps=4, lr_scheduler_type="constant")
    assert learning_rate(constant, 999) == 1.0


def test_schedule_reaches_the_optimizer(tmp_path):
    """Adam's first step has the size of its learning rate, which is a thousandth of the peak in a
    warm-up of 1,000 steps."""
    run(tmp_path, "--max_steps 1 --learning_rate 1e-3 --warmup_steps 1000")
    saved = adapter_weights(tmp_path)
    change = max(value.abs().max().item() for name, value in saved.items() if "lora_B" in name)
    assert change == pytest.approx(1e-6, rel=0.05)


# --- precision ---

LOAD_VLM = model.load_vlm


@pytest.fixture
def fp16(monkeypatch):
    """Make every model of a run compute in fp16."""
    monkeypatch.setattr(model, "load_vlm", partial(LOAD_VLM, dtype=torch.float16))


def loss_scale(folder):
    """The loss scale in the newest checkpoint, or None if it has none."""
    state, _ = load_checkpoint(folder / "checkpoint.safetensors")
    return state["scaler"].get("scale")


def test_only_fp16_has_a_loss_scale_and_steps_without_gradient_keep_it(tmp_path, monkeypatch):
    """With this weight all rewards are equal, so there is no backward pass that could overflow."""
    flags = "--max_steps 1 --eval_examples 0 --reward_weights format=1e-9"
    for dtype, scale in ((torch.float16, 2**10), (torch.float32, None), (torch.bfloat16, None)):
        monkeypatch.setattr(model, "load_vlm", partial(LOAD_VLM, dtype=dtype))
        run(tmp_path / str(dtype), flags)
        assert read_log(tmp_path / str(dtype))[0]["skipped_updates"] == 0
        assert loss_scale(tmp_path / str(dtype)) == scale


def overflow_at_steps(monkeypatch, steps):
    """Make the scaled loss of these steps too large for the type of the gradient."""
    original, scale, calls = sayo_mini.train_step, torch.amp.GradScaler.scale, []

    def train_step(*args):
        calls.append(1)
        with monkeypatch.context() as patch:
            if len(calls) in steps:
                large = lambda self, loss: scale(self, loss) * 1e30  # noqa: E731
                patch.setattr(torch.amp.GradScaler, "scale", large)
            return original(*args)

    monkeypatch.setattr(sayo_mini, "train_step", train_step)


@pytest.mark.slow
def test_an_overflow_in_fp16_skips_the_update_and_a_resumed_run_keeps_the_halved_scale(
    tmp_path, fp16, monkeypatch
):
    flags = f"--save_steps 2 --lr_scheduler_type constant --dataset {DATASET} --eval_examples 1"
    for name, steps in (("whole", 4), ("cut", 2)):  # nothing but the end depends on --max_steps
        overflow_at_steps(monkeypatch, {2})
        run(tmp_path / name, f"{flags} --max_steps {steps}")
    rows = read_log(tmp_path / "whole")
    assert [row["skipped_updates"] for row in rows] == [0, 1, 0, 0]
    assert rows[1]["grad_norm"] is None and rows[3]["grad_norm"] > 0
    assert loss_scale(tmp_path / "cut") == 2**9
    flags = ["--resume", "--max_steps", "4", "--output_dir", str(tmp_path / "cut")]
    assert sayo_mini.main(flags) == 0
    for file in ("metrics.jsonl", "samples.jsonl", "after.json", "checkpoint.safetensors"):
        whole, cut = ((tmp_path / name / file).read_bytes() for name in ("whole", "cut"))
        assert whole == cut, file


# --- non-finite output ---


def nan_after_six_calls(monkeypatch, module):
    """Make the output of this language-model module NaN in the second or third step."""
    counter = []

    def hook(module, args, out):
        counter.append(1)
        return out * math.nan if len(counter) > 6 else out

    def load_vlm(*args, **settings):
        vlm = LOAD_VLM(*args, **settings)
        vlm.core.model.language_model.get_submodule(module).register_forward_hook(hook)
        return vlm

    monkeypatch.setattr(model, "load_vlm", load_vlm)


def test_nan_during_training_stops_after_ten_skipped_updates(tmp_path, monkeypatch, capfd):
    """Each skipped step is logged with its samples as JSON, and no half-written file remains."""
    nan_after_six_calls(monkeypatch, "layers.0")
    (tmp_path / "mine.py").write_text("def mass(x): return x.attention.sum((1, 2))")
    own = f"--reward {tmp_path / 'mine.py'}:mass --reward_weights attention=1,mass=1"
    run(tmp_path / "run", f"--max_steps 30 --eval_examples 0 {own}", expect=2)
    assert "not finite in 10 steps in a row" in error_line(capfd)
    rows, samples = read_log(tmp_path / "run"), read_log(tmp_path / "run", "samples.jsonl")
    skipped = [row["skipped_updates"] for row in rows]
    assert skipped[0] == 0 and skipped[-10:] == [1] * 10
    assert rows[-1]["loss"] is None and rows[-1]["attention/auroc"] is None
    assert len(samples) == 8 * len(rows) and samples[-1]["attention"] is None
    assert not list((tmp_path / "run").glob("unfinished-*"))


def test_run_with_skipped_updates_ends_with_a_report(tmp_path, monkeypatch):
    """All completions and therefore all rewards are equal in the skipped steps, but the NaN
    log-probabilities still skip the update."""
    nan_after_six_calls(monkeypatch, "norm")
    run(tmp_path, "--max_steps 4 --eval_examples 0")
    skipped = [row["skipped_updates"] for row in read_log(tmp_path)]
    assert skipped[0] == 0 and skipped[-1] == 1
    assert "NaN" not in (tmp_path / "report.html").read_text()
