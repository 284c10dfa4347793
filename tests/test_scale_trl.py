"""extras/scale_trl.py: the same rewards, log-probabilities, loss, gradient and updates as
sayo_mini.py; one and two processes; resuming; adapters; refused settings.

Run as a script, this file runs scale_trl.py with fixed completions instead of sampled ones.
"""

import json
import random
import runpy
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import FAST, ROOT, adapter_weights, error_line, randomize_adapter, read_log, trained
from trl import GRPOTrainer

import sayo_mini
from config import parse_command_line
from data import encode_example, load_datasets, step_examples
from extras import scale_trl
from model import Vlm, load_model
from scenes import Scenes

SCRIPT = str(ROOT / "extras" / "scale_trl.py")
FAST = [*FAST, "--prompts_per_step", "3", "--eval_examples", "2"]


def run(folder, flags="", code=0):
    argv = [*FAST, "--output_dir", str(folder), *shlex.split(flags)]
    assert scale_trl.main(argv) == code


def read_updates(folder):
    """The rows of the log that TRL wrote for updates."""
    return [row for row in read_log(folder) if "loss" in row]


def largest_difference(a, b):
    """The largest absolute difference between two dicts of tensors."""
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


def make_config(folder, flags=""):
    argv = [*FAST, "--max_steps", "1", "--output_dir", str(folder), *shlex.split(flags)]
    return scale_trl.run_config(parse_command_line(argv)[1])


def make_trainer(folder, flags=""):
    """Returns: (cfg, TRL's trainer, its Vlm)."""
    cfg = make_config(folder, flags)
    torch.manual_seed(cfg.seed)
    vlm = load_model(cfg)
    args, train_set = scale_trl.trl_config(cfg), load_datasets(cfg)[0]
    return cfg, scale_trl.SayoTrainer(cfg, args, vlm, train_set), vlm


def record_gradients(vlm, optimizer):
    """Returns: a dict that will contain the clipped gradients once the optimizer has stepped."""
    gradients, named = {}, trained(vlm)
    optimizer.register_step_pre_hook(
        lambda *_: gradients.update({name: p.grad.clone() for name, p in named.items()})
    )
    return gradients


def fixed_completion(tokenizer, step, row):
    """11 to 16 tokens that depend only on the step and the row of the batch."""
    rng = random.Random(f"{step} {row}")
    color, more = rng.choice(["red", "blue", "cyan"]), "the " * rng.randint(0, 5)
    text = f"the dot on {more}red is {color} . <answer> {color} </answer><|im_end|>"
    return tokenizer(text, add_special_tokens=False).input_ids


def generate_fixed(trainer, prompt_ids, images, fields, num_generations):
    """Replaces TRL's `_generate_single_turn`. A row gets the same completion regardless of how many
    processes share the batch."""
    first = trainer.accelerator.process_index * len(prompt_ids)
    step = trainer.state.global_step // trainer.args.num_iterations
    tokenizer, rows = trainer.processing_class.tokenizer, range(first, first + len(prompt_ids))
    return [fixed_completion(tokenizer, step, row) for row in rows], None


def write_unequal_prompts(folder):
    """A data set with two lengths of questions and two sizes of images. Returns: its path."""
    image = Scenes("validation", 1)[0].image
    image.save(folder / "square.png")
    image.resize((112, 64)).save(folder / "wide.png")
    question, row = "what color is the dot ?", {"answer": "red", "boxes": [[1, 1, 30, 30]]}
    prompts = [("square", question), ("square", f"{question} the dot ?"), ("wide", question)]
    rows = [row | {"image": f"{name}.png", "question": text} for name, text in prompts]
    (folder / "set.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder / "set.jsonl"


CASES = {  # case -> (--completions_per_forward, more flags)
    "half groups": (2, ""),
    "all groups": (12, "--gradient_checkpointing"),
    "Qwen2.5-VL": (12, "--max_completion_length 9 --model_name_or_path {qwen}"),
    "InternVL": (12, "--max_completion_length 9 --model_name_or_path {internvl}"),
}


@pytest.mark.parametrize("case", CASES)
def test_one_step_equals_that_of_sayo_mini(tmp_path, monkeypatch, qwen2_5, internvl, case):
    """With the same completions, log-probabilities, rewards, advantages, loss (with KL) and
    gradient agree to 1e-5, whatever the lengths of prompts in a batch. The adapter is random, so
    that the reference differs from the policy. One reward is the user's; the temperature is 2."""
    per_forward, flags = CASES[case]
    flags = flags.format(qwen=qwen2_5, internvl=internvl)
    flags += f" --completions_per_forward {per_forward} --beta 0.1"
    flags += f" --dataset {write_unequal_prompts(tmp_path)} --eval_examples 0 --temperature 2"
    (tmp_path / "mine.py").write_text("def length(x):\n    return [n / 20 for n in x.lengths]")
    flags += f" --reward {tmp_path}/mine.py:length --max_pixels 12544"
    flags += " --reward_weights attention=1,format=0.5,accuracy=0.25,length=0.1"
    cfg, trainer, vlm = make_trainer(tmp_path / "run", f"{flags} --learning_rate 0")
    assert trainer.args.per_device_train_batch_size == per_forward
    randomize_adapter(vlm)
    groups, original = [], sayo_mini.sample
    monkeypatch.setattr(sayo_mini, "sample", lambda *a: groups.extend(original(*a)) or groups)
    examples = step_examples(load_datasets(cfg)[0], 0, cfg)
    optimizer = torch.optim.SGD(trained(vlm).values(), lr=0)
    ours, generator = record_gradients(vlm, optimizer), torch.Generator().manual_seed(0)
    metrics, samples = sayo_mini.train_step(vlm, examples, cfg, optimizer, generator)
    # With equal rewards TRL behaves differently, see docs/scaling.md.
    assert metrics["frac_reward_zero_std"] == 0
    prompts = [g.prompt for g in groups for _ in range(cfg.num_generations)]
    rows = [row for g in groups for row in zip(g.completions.ids, g.completions.mask, g.old_logps)]
    completions = [ids[mask].tolist() for ids, mask, _ in rows]
    assert len({len(p.input_ids) for p in prompts}) >= 2 and len(set(map(len, completions))) > 1

    def generate_same(trainer, prompt_ids, images, fields, num_generations):
        assert prompt_ids == [prompt.input_ids.tolist() for prompt in prompts]
        pixels = torch.cat([prompt.image["pixel_values"] for prompt in prompts])
        assert torch.equal(torch.as_tensor(fields["pixel_values"]), pixels)
        return completions, None

    monkeypatch.setattr(GRPOTrainer, "_generate_single_turn", generate_same)
    score, logps = GRPOTrainer._get_per_token_logps_and_entropies, {}

    def record_logps(trainer, model, ids, mask, count, *args, **kwargs):
        out = score(trainer, model, ids, mask, count, *args, **kwargs)
        if out[0].requires_grad:  # not those of the reference
            for row, real, values in zip(ids, mask.bool(), out[0].detach()):
                logps[tuple(row[real].tolist())] = values[real[-count:]]
        return out

    monkeypatch.setattr(GRPOTrainer, "_get_per_token_logps_and_entropies", record_logps)
    theirs = record_gradients(vlm, trainer.create_optimizer())
    trainer.train()
    assert vlm.core.is_activation_checkpointing == cfg.gradient_checkpointing
    for prompt, (ids, mask, values) in zip(prompts, rows):
        row = (*prompt.input_ids.tolist(), *ids[mask].tolist())
        assert (logps[row] - values[mask]).abs().max() < 1e-5
    row = trainer.state.log_history[0]
    for name in ("loss", "grad_norm", "reward", "rewards/attention/mean", "rewards/accuracy/mean"):
        assert row[name] == pytest.approx(metrics[name], abs=1e-5), name
    logged = trainer._logs["rewards"] | {"advantage": trainer._logs["advantages"]}
    assert logged.keys() == {*cfg.rewards, "advantage"}
    for name, values in logged.items():
        assert list(values) == pytest.approx([s[name] for s in samples], abs=1e-5), name
    assert row["kl"] > 1e-3
    largest = max(gradient.abs().max().item() for gradient in ours.values())
    assert largest_difference(ours, theirs) < 1e-5 * largest


@pytest.mark.slow
def test_updates_equal_those_of_sayo_mini(tmp_path, monkeypatch):
    """AdamW, the learning rate, weight decay, several iterations and the order of the questions
    agree over two steps of two updates."""
    flags = "--max_steps 2 --num_iterations 2 --learning_rate 1e-3 --weight_decay 20 --beta 0.1"
    flags += " --warmup_steps 1 --epsilon 0.01 --format_lengths 14,16 --token_fraction 1"
    cfg = make_config(tmp_path, flags)
    monkeypatch.setattr(GRPOTrainer, "_generate_single_turn", generate_fixed)
    run(tmp_path, flags)
    torch.manual_seed(cfg.seed)
    vlm, train_set = load_model(cfg), load_datasets(cfg)[0]
    params = trained(vlm)
    optimizer = torch.optim.AdamW(params.values(), weight_decay=cfg.weight_decay)
    for step in range(2):

        def sample_groups(vlm, prompts, G, *settings, step=step):
            rows = [fixed_completion(vlm.tokenizer, step, row) for row in range(len(prompts) * G)]
            groups = [rows[i : i + G] for i in range(0, len(rows), G)]
            packed = [scale_trl.pack_completions(vlm, group, cfg) for group in groups]
            return [replace(group, finished=group.mask.any(1)) for group in packed]

        monkeypatch.setattr(Vlm, "sample_groups", sample_groups)
        optimizer.param_groups[0]["lr"] = sayo_mini.learning_rate(cfg, step)
        examples = step_examples(train_set, step, cfg)
        sayo_mini.train_step(vlm, examples, cfg, optimizer, torch.Generator())
    # Compare by norm, because Adam makes a full step even where a gradient is almost 0.
    for name, theirs in adapter_weights(tmp_path).items():
        ours = params[name.replace(".weight", ".default.weight")]
        assert (ours - theirs).norm() < 1e-3 * ours.norm(), name


def test_trl_samples_the_same_completions(tmp_path):
    """With the same random numbers, both sample from the whole distribution except image
    placeholders, which are made as probable here as the word "the"."""
    flags = "--temperature 3 --prompts_per_step 1 --num_generations 16"
    cfg, trainer, vlm = make_trainer(tmp_path, flags)
    randomize_adapter(vlm)
    weight = vlm.core.lm_head.weight.data
    weight[vlm.placeholders] = weight[vlm.tokenizer.convert_tokens_to_ids("the")].clone()
    row = trainer.train_dataset[0]
    text = {"type": "text", "text": row["prompt"][0]["content"]}
    content = [{"type": "image", "image": row["image"]}, text]
    messages = [[{"role": "user", "content": content}] for _ in range(16)]
    prompt_ids, images, fields = trainer._tokenize_prompts(messages)
    torch.manual_seed(0)
    theirs, _ = trainer._generate_single_turn(prompt_ids, images, fields, 16)
    torch.manual_seed(0)
    prompt = encode_example(vlm, load_datasets(cfg)[0][0], cfg)
    ours = vlm.sample(prompt, 16, cfg.max_completion_length, cfg.temperature)
    assert theirs == [ids[mask].tolist() for ids, mask in zip(ours.ids, ours.mask)]
    assert not set(vlm.placeholders) & set(ours.ids.flatten().tolist())


def test_four_bits_leave_the_adapter_in_full_precision(tmp_path):
    """TRL alone would round the adapter to bf16 and measure KL from a copy of it."""
    cfg, trainer, vlm = make_trainer(tmp_path, "--load_in_4bit --learning_rate 1e-6")
    torch.manual_seed(cfg.seed)
    initial, adapter = trained(load_model(cfg)), trained(vlm)
    assert {p.dtype for p in adapter.values()} == {torch.float32}
    assert largest_difference(adapter, initial) == 0
    assert list(vlm.model.peft_config) == ["default"]
    trainer.train()
    assert largest_difference(trained(vlm), initial) > 0


def test_trl_scales_the_loss_if_the_device_computes_in_fp16(tmp_path, monkeypatch):
    """Autocast is off, because it would change the types of the weights."""
    cfg, trainer, _ = make_trainer(tmp_path)
    assert trainer.accelerator.autocast_handler.enabled is False
    make = lambda **given: SimpleNamespace(deepspeed_plugin=None, **given)  # noqa: E731
    monkeypatch.setattr(scale_trl, "GRPOConfig", make)  # TRL's own needs a card for fp16
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        monkeypatch.setattr(scale_trl, "choose_device", lambda device: ("cuda", dtype))
        args = scale_trl.trl_config(cfg)
        assert args.fp16 == (dtype == torch.float16) and args.bf16 is False


def run_two_processes(folder, flags):
    """Run this file as a script in two processes. Returns: stdout."""
    command = [sys.executable, *"-m torch.distributed.run --standalone --nproc_per_node 2".split()]
    command += [__file__, *FAST, "--output_dir", folder, *flags.split()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_two_processes_equal_one_and_resume(tmp_path, monkeypatch):
    """Two processes share three groups of four completions: each scores one whole group and half
    of the middle one."""
    monkeypatch.setattr(GRPOTrainer, "_generate_single_turn", generate_fixed)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
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
    assert one[3]["kl"] > 1e-3  # the policy has changed

    whole = adapter_weights(folder)
    shutil.rmtree(folder / "adapter")
    shutil.rmtree(folder / "checkpoint-4")
    (folder / "checkpoint-4").mkdir()  # a kill can leave an empty folder behind
    out = run_two_processes(folder, "--resume")
    assert out.count(f"resuming {folder / 'checkpoint-2'}") == 1  # only the first process prints
    assert out.count("'loss'") == 2  # the two missing steps
    assert largest_difference(adapter_weights(folder), whole) == 0
    assert [row["step"] for row in read_updates(folder)] == [1, 2, 3, 4]


@pytest.mark.slow
def test_a_sampled_run_resumes_bit_for_bit(tmp_path, capsys):
    """The random generator continues where it stopped. Resuming a finished run changes nothing."""
    run(tmp_path, "--max_steps 2 --save_steps 1 --report_to tensorboard")
    assert json.loads((tmp_path / "config.json").read_text())["report_to"] == "tensorboard"
    capsys.readouterr()
    assert not (tmp_path / "samples.jsonl").exists()  # TRL logs no samples
    assert "# LoRA adapter for tiny" in (tmp_path / "adapter" / "README.md").read_text()
    whole, logged = adapter_weights(tmp_path), read_updates(tmp_path)
    shutil.rmtree(tmp_path / "checkpoint-2")
    for missing_steps in (1, 0):
        shutil.rmtree(tmp_path / "adapter")
        assert scale_trl.main(["--resume", "--output_dir", str(tmp_path)]) == 0
        assert largest_difference(adapter_weights(tmp_path), whole) == 0
        assert capsys.readouterr().out.count("'loss'") == missing_steps
        rewards = [row["reward"] for row in read_updates(tmp_path)]
        assert rewards == [row["reward"] for row in logged]


def refused(capfd, folder, flags=""):
    """Run with flags that are refused. Returns: the one line on stderr."""
    capfd.readouterr()
    run(folder, f"--max_steps 1 {flags}", code=2)
    return error_line(capfd, "scale_trl.py")


def test_what_cannot_work_is_refused(capfd, tmp_path, monkeypatch):
    mini = tmp_path / "mini"
    mini.mkdir()
    (mini / "config.json").write_text(json.dumps(vars(make_config(mini))))
    (mini / "checkpoint.safetensors").touch()  # a run of sayo_mini.py
    assert "already contains a run" in refused(capfd, mini)
    assert "has a run of sayo_mini.py: resume it there" in refused(capfd, mini, "--resume")
    for flag in ("--max_steps 0", "--keep_best", "--deterministic"):
        assert flag in refused(capfd, tmp_path / "run", flag)
    monkeypatch.setenv("WORLD_SIZE", "5")
    assert "number of processes, 5" in refused(capfd, tmp_path / "run")
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")  # `accelerate launch --use_fsdp`
    assert "FSDP" in refused(capfd, tmp_path / "run")
    monkeypatch.delenv("ACCELERATE_USE_FSDP")
    zero3 = SimpleNamespace(deepspeed_plugin=SimpleNamespace(zero_stage=3))
    monkeypatch.setattr(scale_trl, "GRPOConfig", lambda **settings: zero3)  # needs DeepSpeed
    assert "ZeRO-3" in refused(capfd, tmp_path / "run")
    assert not (tmp_path / "run").exists()


if __name__ == "__main__":
    GRPOTrainer._generate_single_turn = generate_fixed
    runpy.run_path(SCRIPT, run_name="__main__")
