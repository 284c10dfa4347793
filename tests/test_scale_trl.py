"""Tests of scale_trl.py: the same rewards, advantages, loss and gradient as sayo_mini.py; one and
two processes; resuming; exchange of adapters; refused settings.

Run as a script, this file runs scale_trl.py with fixed completions instead of sampled ones.
"""

import itertools
import json
import os
import random
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY
from safetensors.torch import load_file
from torch.nn.utils.rnn import pad_sequence
from trl import GRPOTrainer

import sayo_mini
import scale_trl
from config import InputError
from data import encode_example
from model import Completions, Vlm
from runtime.parser import parse_config
from sayo_mini import train_step
from sources import epoch_index, load_datasets

ROOT = Path(__file__).parent.parent
PROGRAM = "accelerate launch scale_trl.py"
FAST = "--device cpu --no-load_in_4bit --prompts_per_step 3 --num_generations 4".split()
FAST += "--eval_examples 2 --model_name_or_path".split() + [str(TINY)]


def run(folder, flags="", expect=0):
    """Run scale_trl.py in this process; check the exit code."""
    argv = [*FAST, "--output_dir", str(folder), *shlex.split(flags)]
    assert sayo_mini.main(argv, scale_trl.train, PROGRAM) == expect


def run_sayo_mini(folder, flags="", expect=0):
    argv = [*FAST, "--output_dir", str(folder), *shlex.split(flags)]
    assert sayo_mini.main(argv) == expect


def read_updates(folder):
    """The rows of the log that TRL wrote for updates."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "loss" in row]


def load_adapter(folder):
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def largest_difference(a, b):
    """The largest absolute difference between two dicts of tensors."""
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


def make_trainer(tmp_path, flags=""):
    """Returns: (cfg, TRL's trainer, its Vlm)."""
    argv = [*FAST, "--max_steps", "1", "--output_dir", str(tmp_path), *shlex.split(flags)]
    cfg = parse_config(argv)
    torch.manual_seed(cfg.seed)
    vlm = sayo_mini.load_model(cfg)
    trainer = scale_trl.make_trainer(cfg, scale_trl.trl_config(cfg), vlm, load_datasets(cfg)[0])
    return cfg, trainer, vlm


def trainable_parameters(vlm):
    return {name: p for name, p in vlm.model.named_parameters() if p.requires_grad}


def randomize_adapter(vlm):
    """Make the adapter change the output. LoRA's B starts at 0, and many tests would pass by
    accident with an adapter that does nothing."""
    torch.manual_seed(1)
    for name, p in vlm.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.02)


def record_gradients(vlm, optimizer):
    """Returns: a dict that will contain the clipped gradients once the optimizer has stepped."""
    gradients, named = {}, trainable_parameters(vlm)
    optimizer.register_step_pre_hook(
        lambda *_: gradients.update({name: p.grad.clone() for name, p in named.items()})
    )
    return gradients


# --- fixed completions ---


def fixed_completion(tokenizer, step, row):
    """13 to 18 tokens that depend only on the step and the row of the batch."""
    rng = random.Random(f"{step} {row}")
    place = f"r{rng.randint(1, 7)} c{rng.randint(1, 7)}"
    color = rng.choice(["red", "blue", "cyan"])
    text = f"the dot on {'the ' * rng.randint(0, 5)}red {place} is {color} . "
    text += f"<answer> {color} </answer><|im_end|>"
    return tokenizer(text, add_special_tokens=False).input_ids


def generate_fixed(trainer, prompt_ids, images, fields, num_generations):
    """Replaces TRL's `_generate_single_turn`. A row gets the same completion regardless of how many
    processes share the batch."""
    first = trainer.accelerator.process_index * len(prompt_ids)
    step = trainer.state.global_step // trainer.args.num_iterations
    tokenizer, rows = trainer.processing_class.tokenizer, range(first, first + len(prompt_ids))
    return [fixed_completion(tokenizer, step, row) for row in rows], None


# --- parity ---


CASES = {  # case -> (--completions_per_forward, more flags)
    "half groups": (2, ""),
    "recomputed": (0, "--gradient_checkpointing"),
    "Qwen2.5-VL": (0, ""),
}


@pytest.mark.parametrize("case", CASES)
def test_one_step_equals_that_of_sayo_mini(tmp_path, monkeypatch, qwen2_5, case):
    """With the same completions, prompts are equal, and rewards, advantages, loss (with KL) and
    gradient agree to 1e-5. The adapter is random, so that the reference differs from the policy,
    and the temperature is not 1."""
    per_forward, flags = CASES[case]
    flags += " --beta 0.1 --temperature 2 --learning_rate 0 --instruction 'look ?'"
    flags += f" --completions_per_forward {per_forward}"
    flags += " --reward_weights attention=1,format=0.5,accuracy=0.25"
    if case == "Qwen2.5-VL":
        flags += f" --model_name_or_path {qwen2_5} --max_pixels 12544 --max_completion_length 9"
    cfg, trainer, vlm = make_trainer(tmp_path, flags)
    assert trainer.args.per_device_train_batch_size == (per_forward or cfg.num_generations)
    randomize_adapter(vlm)
    sampled, train_set = [], load_datasets(cfg)[0]
    indices = [epoch_index(i, len(train_set), cfg.seed) for i in range(cfg.prompts_per_step)]
    examples = [train_set[i] for i in indices]
    original = sayo_mini.score_and_reward

    def score_and_reward(vlm, rollouts, cfg):
        sampled.extend(completions for *_, completions in rollouts)
        return original(vlm, rollouts, cfg)

    monkeypatch.setattr(sayo_mini, "score_and_reward", score_and_reward)
    optimizer = torch.optim.SGD(trainable_parameters(vlm).values(), lr=0)
    ours = record_gradients(vlm, optimizer)
    metrics, samples = train_step(vlm, examples, cfg, optimizer, torch.Generator().manual_seed(0))
    # With equal rewards TRL behaves differently, see docs/scaling.md.
    assert metrics["frac_reward_zero_std"] == 0
    assert len({mask.sum().item() for c in sampled for mask in c.mask}) > 1  # lengths differ

    def generate_same(trainer, prompt_ids, images, fields, num_generations):
        prompts = [encode_example(vlm, e, cfg) for e in examples for _ in range(num_generations)]
        assert prompt_ids == [prompt.input_ids.tolist() for prompt in prompts]
        pixels = torch.cat([prompt.pixel_values for prompt in prompts])
        assert torch.equal(torch.as_tensor(fields["pixel_values"]), pixels)
        return [ids[mask].tolist() for c in sampled for ids, mask in zip(c.ids, c.mask)], None

    monkeypatch.setattr(GRPOTrainer, "_generate_single_turn", generate_same)
    theirs = record_gradients(vlm, trainer.create_optimizer())
    trainer.train()
    assert vlm.core.is_activation_checkpointing == cfg.gradient_checkpointing
    row = trainer.state.log_history[0]
    for name in ("loss", "grad_norm", "reward", "rewards/attention/mean", "rewards/accuracy/mean"):
        assert row[name] == pytest.approx(metrics[name], abs=1e-5), name
    logged = {name: trainer._logs["rewards"][name] for name in ("attention", "format", "accuracy")}
    for name, values in (logged | {"advantage": trainer._logs["advantages"]}).items():
        assert list(values) == pytest.approx([s[name] for s in samples], abs=1e-5), name
    assert row["kl"] > 1e-3
    largest = max(gradient.abs().max().item() for gradient in ours.values())
    assert largest_difference(ours, theirs) < 1e-5 * largest


def test_updates_equal_those_of_sayo_mini(tmp_path, monkeypatch):
    """AdamW, the learning rate, weight decay, several iterations and the order of the questions
    agree over two steps of two updates."""
    flags = "--max_steps 2 --num_iterations 2 --learning_rate 1e-3 --weight_decay 20 --beta 0.1"
    flags += " --warmup_steps 1 --epsilon 0.01 --format_lengths 14,16 --token_fraction 1"
    monkeypatch.setattr(GRPOTrainer, "_generate_single_turn", generate_fixed)
    run(tmp_path / "trl", flags)
    groups = itertools.count()

    def sample(vlm, G):
        step, group = divmod(next(groups), 3)
        rows = range(group * G, (group + 1) * G)
        ids = [torch.tensor(fixed_completion(vlm.tokenizer, step, row)) for row in rows]
        mask = pad_sequence([torch.ones_like(row).bool() for row in ids], batch_first=True)
        texts = [vlm.tokenizer.decode(row, skip_special_tokens=True) for row in ids]
        return Completions(pad_sequence(ids, batch_first=True), mask, texts, finished=mask.any(1))

    def sample_groups(vlm, prompts, G, *rest):
        return [sample(vlm, G) for _ in prompts]

    monkeypatch.setattr(Vlm, "sample_groups", sample_groups)
    run_sayo_mini(tmp_path / "mini", f"{flags} --eval_examples 0")
    theirs = load_adapter(tmp_path / "trl")
    # Compare by norm, because Adam makes a full step even where a gradient is almost 0.
    for name, value in load_adapter(tmp_path / "mini").items():
        assert (value - theirs[name]).norm() < 1e-3 * value.norm(), name


def test_trl_samples_the_same_completions(tmp_path):
    """With the same random numbers, both sample from the whole distribution except image
    placeholders."""
    flags = "--temperature 3 --prompts_per_step 1 --num_generations 16"
    cfg, trainer, vlm = make_trainer(tmp_path, flags)
    randomize_adapter(vlm)
    row = trainer.train_dataset[0]
    text = row["prompt"][0]["content"]
    content = [{"type": "image", "image": row["image"]}, {"type": "text", "text": text}]
    messages = [[{"role": "user", "content": content}] for _ in range(16)]
    prompt_ids, images, fields = trainer._tokenize_prompts(messages)
    torch.manual_seed(0)
    theirs, _ = trainer._generate_single_turn(prompt_ids, images, fields, 16)
    torch.manual_seed(0)
    prompt = encode_example(vlm, load_datasets(cfg)[0][0], cfg)
    ours = vlm.sample(prompt, 16, cfg.max_completion_length, cfg.temperature)
    assert theirs == [ids[mask].tolist() for ids, mask in zip(ours.ids, ours.mask)]
    assert not set(vlm.placeholders) & set(ours.ids.flatten().tolist())


def test_scoring_does_not_change_the_trainer(tmp_path):
    """The model remains in train mode and gets no gradient. The rows of one example need not be a
    whole group."""
    cfg, trainer, vlm = make_trainer(tmp_path)
    randomize_adapter(vlm)
    score, batch = trainer.reward_funcs[0], [trainer.train_dataset[i] for i in (0, 0, 1, 1, 1)]
    columns = {name: [row[name] for row in batch] for name in batch[0] if name != "prompt"}
    ids = [[33, 20, 8, 7], [20, 33, 8], [9, 9, 12, 30], [11], [30, 31]]
    vlm.model.train()
    together = score(None, None, ids, **columns)
    assert vlm.model.training
    assert all(p.grad is None for p in vlm.model.parameters())
    alone = []
    for i in range(5):
        row = {name: [column[i]] for name, column in columns.items()}
        alone += score(None, None, [ids[i]], **row)
    assert together == pytest.approx(alone, abs=1e-5) and len(set(together)) == 5


def test_four_bits_leave_the_adapter_in_full_precision(tmp_path):
    """TRL alone would round the adapter to bf16 and measure KL from a copy of it."""
    cfg, trainer, vlm = make_trainer(tmp_path, "--load_in_4bit --learning_rate 1e-6")
    torch.manual_seed(cfg.seed)
    initial = trainable_parameters(sayo_mini.load_model(cfg))
    adapter = trainable_parameters(vlm)
    assert {p.dtype for p in adapter.values()} == {torch.float32}
    assert largest_difference(adapter, initial) == 0
    assert list(vlm.model.peft_config) == ["default"]
    trainer.train()
    trained = {name: p for name, p in vlm.model.named_parameters() if name in initial}
    assert largest_difference(trained, initial) > 0


def test_deepspeed_gets_the_learning_rate(tmp_path):
    """DeepSpeed drops the optimizer and the scheduler passed to the trainer and lets the trainer
    create new ones."""
    flags = "--learning_rate 3e-4 --weight_decay 0.3 --warmup_steps 4 --max_grad_norm 0.7"
    _, trainer, _ = make_trainer(tmp_path, flags)
    trainer.optimizer = trainer.lr_scheduler = None
    optimizer = trainer.create_optimizer()
    trainer.create_scheduler(num_training_steps=9)
    assert {group["weight_decay"] for group in optimizer.param_groups if group["params"]} == {0.3}
    assert trainer.lr_scheduler.get_last_lr()[0] == pytest.approx(3e-4 / 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_trl_scales_the_loss_if_the_device_computes_in_fp16(tmp_path, monkeypatch, dtype):
    """The rule is that of sayo_mini.py. Autocast is off, because it would change the types of the
    weights."""
    cfg, trainer, _ = make_trainer(tmp_path)
    assert trainer.accelerator.autocast_handler.enabled is False
    settings = {}
    monkeypatch.setattr(scale_trl, "choose_device", lambda device: (torch.device("cuda"), dtype))
    monkeypatch.setattr(
        scale_trl,
        "GRPOConfig",
        lambda **given: settings.update(given) or SimpleNamespace(deepspeed_plugin=None),
    )
    scale_trl.trl_config(cfg)
    assert settings["fp16"] == (dtype == torch.float16) and settings["bf16"] is False


# --- several processes, resuming ---


def run_two_processes(folder, flags):
    """Run this file as a script in two processes. Returns: stdout."""
    launch = [sys.executable, *"-m torch.distributed.run --standalone --nproc_per_node 2".split()]
    done = subprocess.run(
        [*launch, __file__, *FAST, "--output_dir", str(folder), *shlex.split(flags)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_two_processes_equal_one_and_resume(tmp_path, monkeypatch):
    """Two processes share three groups of four completions: each scores one whole group and half
    of the middle one."""
    monkeypatch.setattr(GRPOTrainer, "_generate_single_turn", generate_fixed)
    flags = "--max_steps 4 --save_steps 2 --learning_rate 2e-3 --warmup_steps 2 --beta 0.1"
    flags += " --format_lengths 14,16"
    run(tmp_path / "one", flags)
    folder = tmp_path / "two"
    run_two_processes(folder, flags)
    one, two = read_updates(tmp_path / "one"), read_updates(folder)
    prefixes = ("reward", "loss", "learning_rate", "grad_norm")
    names = [name for name in one[0] if name.startswith(prefixes)]
    assert len(one) == len(two) == 4 and len(names) > 8
    for ours, theirs in zip(one, two):
        expected = [ours[name] for name in names]
        assert [theirs[name] for name in names] == pytest.approx(expected, rel=1e-4, abs=1e-4)
    first = one[0]["rewards/attention/mean"]
    assert two[0]["rewards/attention/mean"] == pytest.approx(first, abs=1e-5)
    assert one[3]["kl"] > 1e-3  # the policy has changed
    cfg = SimpleNamespace(**json.loads((folder / "config.json").read_text()))
    rates = [sayo_mini.learning_rate(cfg, step) for step in range(4)]
    assert [row["learning_rate"] for row in two] == pytest.approx(rates)

    whole = load_adapter(folder)
    shutil.rmtree(folder / "adapter")
    shutil.rmtree(folder / "checkpoint-4")
    (folder / "checkpoint-4").mkdir()  # a kill can leave an empty folder behind
    out = run_two_processes(folder, "--resume")
    assert out.count(f"resuming {folder / 'checkpoint-2'}") == 1
    assert out.count("'loss'") == 2  # the two missing steps
    assert largest_difference(load_adapter(folder), whole) == 0
    assert [row["step"] for row in read_updates(folder)] == [1, 2, 3, 4]


def test_sampled_run_resumes_bit_for_bit(tmp_path, capsys):
    """The random generator continues where it stopped. Resuming a finished run changes nothing."""
    run(tmp_path, "--max_steps 2 --save_steps 1")
    whole, logged = load_adapter(tmp_path), read_updates(tmp_path)
    shutil.rmtree(tmp_path / "checkpoint-2")
    for missing_steps in (1, 0):
        capsys.readouterr()
        shutil.rmtree(tmp_path / "adapter")
        argv = ["--resume", "--output_dir", str(tmp_path)]
        assert sayo_mini.main(argv, scale_trl.train, PROGRAM) == 0
        assert largest_difference(load_adapter(tmp_path), whole) == 0
        assert capsys.readouterr().out.count("'loss'") == missing_steps
        rewards = [row["reward"] for row in read_updates(tmp_path)]
        assert rewards == [row["reward"] for row in logged]


# --- adapters ---


@pytest.mark.slow
def test_adapters_are_exchanged_with_sayo_mini(tmp_path, capsys):
    """An adapter goes from scale_trl.py to sayo_mini.py and back, and `look` loads it."""
    flags = "--max_steps 2 --learning_rate 1e-2 --warmup_steps 0"
    run(tmp_path / "trl", flags)
    unchanged = f"{flags} --learning_rate 0 --weight_decay 0"
    run_sayo_mini(tmp_path / "mini", f"{unchanged} --adapter {tmp_path / 'trl' / 'adapter'}")
    run(tmp_path / "back", f"{unchanged} --adapter {tmp_path / 'mini' / 'adapter'}")
    run(tmp_path / "new", unchanged)
    trl, mini, back, new = (load_adapter(tmp_path / x) for x in ("trl", "mini", "back", "new"))
    assert largest_difference(trl, mini) == 0
    assert largest_difference(trl, back) == 0
    assert largest_difference(trl, new) > 1e-3
    configs = (tmp_path / name / "adapter" / "adapter_config.json" for name in ("trl", "mini"))
    a, b = (json.loads(path.read_text()) for path in configs)
    assert a == b and a["base_model_name_or_path"] == "tiny"
    assert "# LoRA adapter for tiny" in (tmp_path / "trl" / "adapter" / "README.md").read_text()
    capsys.readouterr()
    look = ["look", "--image", str(ROOT / "example" / "one.png")]
    look += ["--question", "What color is the dot on the card?"]
    look += ["--adapter", str(tmp_path / "trl" / "adapter"), "--output", str(tmp_path / "look.png")]
    assert sayo_mini.main(look) == 0
    assert "after training" in capsys.readouterr().out


# --- the command and refused settings ---


@pytest.mark.slow
def test_documented_command(tmp_path):
    """The launched command trains in 4 bits on a .jsonl file and refuses to overwrite the run."""
    folder = tmp_path / "run"
    command = [sys.executable, *"-m accelerate.commands.launch --cpu --num_processes 1".split()]
    command += ["scale_trl.py", *FAST, "--load_in_4bit", "--max_steps", "1"]
    command += ["--dataset", "example/example.jsonl", "--output_dir", str(folder)]

    def launch():
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)

    process = launch()
    assert process.returncode == 0, process.stderr
    names = {path.name for path in folder.iterdir()}
    assert {"adapter", "config.json", "metrics.jsonl", "checkpoint-1"} <= names
    process = launch()
    assert process.returncode != 0
    assert f"scale_trl.py: {folder} already contains a run" in process.stderr


def assert_refused(capfd, folder, word, flags=""):
    """Check exit code 2 and one line on stderr. Returns: the line without the program name."""
    capfd.readouterr()
    run(folder, f"--max_steps 1 {flags}", expect=2)
    err = capfd.readouterr().err
    assert err.startswith("scale_trl.py: ") and err.count("\n") == 1 and word in err, err
    return err.removeprefix("scale_trl.py: ").strip()


def test_sharded_weights_are_refused(capfd, tmp_path, monkeypatch):
    """docs/scaling.md quotes the message."""
    text = " ".join((ROOT / "docs" / "scaling.md").read_text().split())
    with monkeypatch.context() as patch:
        patch.setenv("ACCELERATE_USE_FSDP", "true")  # what `accelerate launch --use_fsdp` does
        assert assert_refused(capfd, tmp_path / "run", "FSDP") in text
    with monkeypatch.context() as patch:
        # A real plugin needs DeepSpeed.
        zero3 = SimpleNamespace(deepspeed_plugin=SimpleNamespace(zero_stage=3))
        patch.setattr(scale_trl, "GRPOConfig", lambda **settings: zero3)
        assert "ZeRO-2" in assert_refused(capfd, tmp_path / "run", "ZeRO-3")
    assert not (tmp_path / "run").exists()
    sharded = torch.nn.Parameter(torch.zeros(1))
    sharded.ds_id = 7
    vlm = SimpleNamespace(model=SimpleNamespace(parameters=lambda: iter([sharded])))
    with pytest.raises(InputError, match="ZeRO-3"):
        scale_trl.SayoRewards(vlm, None)


def test_completions_that_processes_cannot_share_evenly_are_refused(capfd, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "5")
    assert_refused(capfd, tmp_path / "run", "processes")


def test_neither_program_resumes_a_run_of_the_other(capfd, tmp_path):
    mini, trl = tmp_path / "mini", tmp_path / "trl"
    mini.mkdir()
    (mini / "checkpoint.safetensors").write_bytes(b"")
    (mini / "config.json").write_text("{}")
    assert_refused(capfd, mini, "sayo_mini.py", "--resume")
    (trl / "checkpoint-3").mkdir(parents=True)
    (trl / "checkpoint-3" / "trainer_state.json").write_text("{}")
    capfd.readouterr()
    run_sayo_mini(trl, "--resume", expect=2)
    assert "scale_trl.py" in capfd.readouterr().err
    assert not (trl / "metrics.jsonl").exists()


def test_user_errors_are_one_line(capfd, tmp_path):
    assert_refused(capfd, tmp_path / "run", "nowhere", f"--adapter {tmp_path / 'nowhere'}")
    assert_refused(capfd, tmp_path / "run", "--beta", "--beta much")
    assert_refused(capfd, tmp_path / "run", "--max_steps", "--max_steps 0")
    (tmp_path / "file").write_text("")
    assert_refused(capfd, tmp_path / "file" / "run", "file/run")


def test_scale_trl_has_fewer_than_150_lines():
    assert len((ROOT / "scale_trl.py").read_text().splitlines()) < 150


if __name__ == "__main__":
    GRPOTrainer._generate_single_turn = generate_fixed
    runpy.run_path(str(ROOT / "scale_trl.py"), run_name="__main__")


def test_help_describes_scale_trl_and_loads_no_torch(capsys):
    command = [sys.executable, "-X", "importtime", "scale_trl.py", "--help"]
    process = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert process.returncode == 0 and "torch" not in process.stderr
    assert process.stdout.startswith(f"usage: {PROGRAM} [--flag value ...]")
    assert "several GPUs" in process.stdout and "look" not in process.stdout


def test_a_mistyped_flag_is_reported_before_torch_loads():
    command = [sys.executable, "-X", "importtime", "scale_trl.py", "--max_step", "1"]
    process = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    lines = [line for line in process.stderr.splitlines() if "import time:" not in line]
    assert process.returncode == 2 and "torch" not in process.stderr
    assert len(lines) == 1 and "did you mean --max_steps?" in lines[0]


def test_a_run_ends_by_saying_where_things_are(tmp_path, capsys):
    run(tmp_path / "run", "--max_steps 1")
    out = capsys.readouterr().out
    assert f"starting from the beginning in {tmp_path}/run\n" in out and "checkpoint" not in out
    last = out.splitlines()[-1]
    assert last == (
        f"the adapter is in {tmp_path}/run/adapter, the log in {tmp_path}/run/metrics.jsonl"
    )
    assert (tmp_path / "run" / "adapter" / "adapter_config.json").exists()
    assert not (tmp_path / "run" / "samples.jsonl").exists()  # TRL logs no samples
