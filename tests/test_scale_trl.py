"""scale_trl.py against sayo_mini.py: the same rewards, advantages, loss and gradient; two processes as one; resuming;
adapters that go both ways; what it refuses. Run as a script it is scale_trl.py with answers dealt, not sampled."""

import itertools
import json
import os
import random
import runpy
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
from config import parse
from data import InputError
from evaluate import ask
from model import Completions, Vlm
from sayo_mini import load_data, shuffled, train_step

HERE = Path(__file__).parent.parent
PROGRAM = "accelerate launch scale_trl.py"
FAST = ["--device", "cpu", "--no-load_in_4bit", "--prompts_per_step", "3", "--num_generations", "4",
        "--eval_examples", "2", "--model_name_or_path", str(TINY)]  # fmt: skip


def answer(tokenizer, step, row):
    """Instead of sampling: 13 to 18 tokens that depend on nothing else."""
    luck = random.Random(f"{step} {row}")
    place, color = f"r{luck.randint(1, 7)} c{luck.randint(1, 7)}", luck.choice(["red", "blue", "cyan"])
    text = f"the dot on {'the ' * luck.randint(0, 5)}red {place} is {color} . <answer> {color} </answer><|im_end|>"
    return tokenizer(text, add_special_tokens=False).input_ids


def deal(trainer, prompt_ids, images, fields, num_generations):
    """TRL's `_generate_single_turn`, of such answers; however many processes share the rows."""
    first, step = trainer.accelerator.process_index * len(prompt_ids), trainer.state.global_step
    rows = range(first, first + len(prompt_ids))
    step //= trainer.args.num_iterations
    return [answer(trainer.processing_class.tokenizer, step, row) for row in rows], None


def run(folder, *flags, expect=0):
    assert sayo_mini.main([*FAST, "--output_dir", str(folder), *map(str, flags)], scale_trl.train, PROGRAM) == expect


def rows(folder):
    return [row for row in map(json.loads, (folder / "metrics.jsonl").open()) if "loss" in row]


def adapter(folder):
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def apart(a, b):
    """The largest difference of two dicts of tensors."""
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


def made(tmp_path, *flags):
    """(cfg, TRL's trainer, its Vlm)."""
    cfg = parse([*FAST, "--max_steps", "1", "--output_dir", str(tmp_path), *flags])
    torch.manual_seed(cfg.seed)
    vlm = sayo_mini.load(cfg)
    trainer = scale_trl.make_trainer(cfg, scale_trl.settings(cfg), vlm, load_data(cfg)[0])
    return cfg, trainer, vlm


def stir(vlm):
    """An adapter that is not the identity: LoRA's B starts at 0, and much would be true for 0 alone."""
    torch.manual_seed(1)
    for name, p in vlm.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.02)


def gradients(vlm, optimizer):
    """A dict that will hold the gradients of the optimiser's next step, after clipping."""
    found = {}
    named = [(name, p) for name, p in vlm.model.named_parameters() if p.requires_grad]
    optimizer.register_step_pre_hook(lambda *_: found.update({name: p.grad.clone() for name, p in named}))
    return found


# --- parity ----------------------------------------------------------------------------------------------------------


CASES = {"half groups": (2, []), "recomputed": (0, ["--gradient_checkpointing"]), "Qwen2.5-VL": (0, [])}


@pytest.mark.parametrize("case", CASES)
def test_one_step_is_that_of_sayo_mini(tmp_path, monkeypatch, qwen2_5, case):
    """On the same completions: prompts, rewards, advantages, loss (KL in it) and gradient, to 1e-5. The adapter is not
    the identity, so the reference is not the policy; the temperature is not 1."""
    split, more = CASES[case]
    flags = ["--beta", "0.1", "--temperature", "2", "--learning_rate", "0", "--completions_per_forward", str(split),
             "--reward_weights", "attention=1,format=0.5,accuracy=0.25", "--instruction", "look ?", *more]  # fmt: skip
    if case == "Qwen2.5-VL":
        flags += ["--model_name_or_path", str(qwen2_5), "--max_pixels", "12544", "--max_completion_length", "9"]
    cfg, trainer, vlm = made(tmp_path, *flags)
    assert trainer.args.per_device_train_batch_size == (split or cfg.num_generations)
    stir(vlm)
    seen, train_set = [], load_data(cfg)[0]
    examples = [train_set[shuffled(i, len(train_set), cfg.seed)] for i in range(cfg.prompts_per_step)]
    judge = sayo_mini.judge

    def listen(vlm, group, *args, **kwargs):
        seen.append(group.completions)
        return judge(vlm, group, *args, **kwargs)

    monkeypatch.setattr(sayo_mini, "judge", listen)
    optimizer = torch.optim.SGD([p for p in vlm.model.parameters() if p.requires_grad], lr=0)
    ours = gradients(vlm, optimizer)
    metrics, samples = train_step(vlm, examples, cfg, optimizer, torch.Generator().manual_seed(0))
    assert metrics["frac_reward_zero_std"] == 0  # here TRL goes its own way, see the README
    assert len({mask.sum().item() for c in seen for mask in c.mask}) > 1  # answers of several lengths

    def same_answers(trainer, prompt_ids, images, fields, num_generations):
        prompts = [ask(vlm, e, cfg) for e in examples for _ in range(num_generations)]
        assert prompt_ids == [prompt.input_ids.tolist() for prompt in prompts]
        pixels = torch.cat([prompt.pixel_values for prompt in prompts])
        assert torch.equal(torch.as_tensor(fields["pixel_values"]), pixels)
        return [ids[mask].tolist() for c in seen for ids, mask in zip(c.ids, c.mask)], None

    monkeypatch.setattr(GRPOTrainer, "_generate_single_turn", same_answers)
    theirs = gradients(vlm, trainer.create_optimizer())
    trainer.train()
    assert vlm.core.is_activation_checkpointing == cfg.gradient_checkpointing
    row = trainer.state.log_history[0]
    for name in ("loss", "grad_norm", "reward", "rewards/attention/mean", "rewards/accuracy/mean"):
        assert row[name] == pytest.approx(metrics[name], abs=1e-5), name
    for name in ("attention", "format", "accuracy"):
        assert list(trainer._logs["rewards"][name]) == pytest.approx([s[name] for s in samples], abs=1e-5)
    assert list(trainer._logs["advantages"]) == pytest.approx([s["advantage"] for s in samples], abs=1e-5)
    assert row["kl"] > 1e-3 and apart(ours, theirs) < 1e-5 * max(g.abs().max().item() for g in ours.values())


def test_updates_are_those_of_sayo_mini(tmp_path, monkeypatch):
    """AdamW, its learning rate, its decay, several iterations, the order of the questions: two steps of two updates."""
    flags = ["--max_steps", "2", "--num_iterations", "2", "--learning_rate", "1e-3", "--weight_decay", "20",
             "--beta", "0.1", "--warmup_steps", "1", "--epsilon", "0.01", "--format_lengths", "14,16",
             "--token_fraction", "1"]  # fmt: skip
    monkeypatch.setattr(GRPOTrainer, "_generate_single_turn", deal)
    run(tmp_path / "trl", *flags)
    groups = itertools.count()

    def sample(vlm, G):
        step, group = divmod(next(groups), 3)
        ids = [torch.tensor(answer(vlm.tokenizer, step, group * G + i)) for i in range(G)]
        mask = pad_sequence([torch.ones_like(row).bool() for row in ids], batch_first=True)
        texts = [vlm.tokenizer.decode(row, skip_special_tokens=True) for row in ids]
        return Completions(pad_sequence(ids, batch_first=True), mask, texts, finished=mask.any(1))

    monkeypatch.setattr(Vlm, "sample_groups", lambda vlm, prompts, G, *rest: [sample(vlm, G) for _ in prompts])
    assert sayo_mini.main([*FAST, *flags, "--eval_examples", "0", "--output_dir", str(tmp_path / "mini")]) == 0
    ours, theirs = adapter(tmp_path / "mini"), adapter(tmp_path / "trl")
    for name, value in ours.items():  # by norm: Adam makes a full step of a gradient that is all but 0
        assert (value - theirs[name]).norm() < 1e-3 * value.norm(), name


def test_trl_samples_what_sayo_mini_samples(tmp_path):
    """From the same random numbers the same answers: the whole distribution, less what stands for an image."""
    cfg, trainer, vlm = made(tmp_path, "--temperature", "3", "--prompts_per_step", "1", "--num_generations", "16")
    stir(vlm)
    batch = [trainer.train_dataset[0]] * 16
    messages = [[{"role": "user", "content": [{"type": "image", "image": row["image"]},
                                              {"type": "text", "text": row["prompt"][0]["content"]}]}]
                for row in batch]  # fmt: skip
    prompt_ids, images, fields = trainer._tokenize_prompts(messages)
    torch.manual_seed(0)
    answers, _ = trainer._generate_single_turn(prompt_ids, images, fields, 16)
    torch.manual_seed(0)
    ours = vlm.sample(ask(vlm, load_data(cfg)[0][0], cfg), 16, cfg.max_completion_length, cfg.temperature)
    assert answers == [ids[mask].tolist() for ids, mask in zip(ours.ids, ours.mask)]
    assert not set(vlm.placeholders) & set(ours.ids.flatten().tolist())


def test_scoring_leaves_the_trainer_as_it_was(tmp_path):
    """In train mode, without a gradient; and rows of one example need not come as a whole group."""
    cfg, trainer, vlm = made(tmp_path)
    stir(vlm)
    score, batch = trainer.reward_funcs[0], [trainer.train_dataset[i] for i in (0, 0, 1, 1, 1)]
    columns = {name: [row[name] for row in batch] for name in batch[0] if name != "prompt"}
    ids = [[33, 20, 8, 7], [20, 33, 8], [9, 9, 12, 30], [11], [30, 31]]
    vlm.model.train()
    together = score(None, None, ids, **columns)
    assert vlm.model.training
    assert all(p.grad is None for p in vlm.model.parameters())
    alone = [score(None, None, [ids[i]], **{name: [c[i]] for name, c in columns.items()})[0] for i in range(5)]
    assert together == pytest.approx(alone, abs=1e-5) and len(set(together)) == 5


def test_four_bits_leave_the_adapter_in_full_precision(tmp_path):
    """TRL rounds it to bf16, and by itself would measure KL from a copy of the adapter."""
    cfg, trainer, vlm = made(tmp_path, "--load_in_4bit", "--learning_rate", "1e-6")
    torch.manual_seed(cfg.seed)
    fresh = {n: p for n, p in sayo_mini.load(cfg).model.named_parameters() if p.requires_grad}
    lora = {n: p for n, p in vlm.model.named_parameters() if p.requires_grad}
    assert {p.dtype for p in lora.values()} == {torch.float32} and apart(lora, fresh) == 0
    assert list(vlm.model.peft_config) == ["default"]
    trainer.train()
    assert apart({n: p for n, p in vlm.model.named_parameters() if n in fresh}, fresh) > 0


def test_deepspeed_cannot_drop_the_learning_rate(tmp_path):
    """It forgets the optimiser and the scheduler that a trainer was given, and asks the trainer to make them."""
    flags = ["--learning_rate", "3e-4", "--weight_decay", "0.3", "--warmup_steps", "4", "--max_grad_norm", "0.7"]
    _, trainer, _ = made(tmp_path, *flags)
    trainer.optimizer = trainer.lr_scheduler = None
    optimizer = trainer.create_optimizer()
    trainer.create_scheduler(num_training_steps=9)
    assert {group["weight_decay"] for group in optimizer.param_groups if group["params"]} == {0.3}
    assert trainer.lr_scheduler.get_last_lr()[0] == pytest.approx(3e-4 / 4)


# --- several processes, resuming -------------------------------------------------------------------------------------


def two_processes(folder, *flags):
    """This file as a script, twice, over gloo."""
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", __file__, *FAST,
         "--output_dir", str(folder), *map(str, flags)],
        cwd=HERE, capture_output=True, text=True, timeout=120,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_two_processes_go_the_way_of_one_and_resume(tmp_path, monkeypatch):
    """Three groups of four on two processes: each has a whole one and half of another."""
    monkeypatch.setattr(GRPOTrainer, "_generate_single_turn", deal)
    flags = ["--max_steps", 4, "--save_steps", 2, "--learning_rate", "2e-3", "--warmup_steps", 2, "--beta", "0.1",
             "--format_lengths", "14,16"]  # fmt: skip
    run(tmp_path / "one", *flags)
    two_processes(tmp_path / "two", *flags)
    one, two = rows(tmp_path / "one"), rows(tmp_path / "two")
    names = [name for name in one[0] if name.startswith(("reward", "loss", "learning_rate", "grad_norm"))]
    assert len(one) == len(two) == 4 and len(names) > 8
    for ours, theirs in zip(one, two):
        assert [theirs[name] for name in names] == pytest.approx([ours[name] for name in names], rel=1e-4, abs=1e-4)
    assert one[0]["rewards/attention/mean"] == pytest.approx(two[0]["rewards/attention/mean"], abs=1e-5)
    assert one[3]["kl"] > 1e-3  # it has gone some way
    cfg = json.loads((tmp_path / "two" / "config.json").read_text())
    rates = [sayo_mini.learning_rate(SimpleNamespace(**cfg), step) for step in range(4)]
    assert [row["learning_rate"] for row in two] == pytest.approx(rates)

    whole = adapter(tmp_path / "two")
    shutil.rmtree(tmp_path / "two" / "adapter")
    shutil.rmtree(tmp_path / "two" / "checkpoint-4")
    (tmp_path / "two" / "checkpoint-4").mkdir()  # as a kill may leave it
    out = two_processes(tmp_path / "two", "--resume")
    assert out.count(f"resuming {tmp_path / 'two' / 'checkpoint-2'}") == 1 and out.count("'loss'") == 2  # steps made
    assert apart(adapter(tmp_path / "two"), whole) == 0
    assert [row["step"] for row in rows(tmp_path / "two")] == [1, 2, 3, 4]


def test_a_sampled_run_resumes_to_the_same_bits(tmp_path, capsys):
    """The random numbers go on, too. And a run that is done stays as it is."""
    run(tmp_path, "--max_steps", 2, "--save_steps", 1)
    whole, logged = adapter(tmp_path), rows(tmp_path)
    shutil.rmtree(tmp_path / "checkpoint-2")
    for steps in (1, 0):
        capsys.readouterr()
        shutil.rmtree(tmp_path / "adapter")
        assert sayo_mini.main(["--resume", "--output_dir", str(tmp_path)], scale_trl.train, PROGRAM) == 0
        assert apart(adapter(tmp_path), whole) == 0 and capsys.readouterr().out.count("'loss'") == steps
        assert [row["reward"] for row in rows(tmp_path)] == [row["reward"] for row in logged]


# --- adapters --------------------------------------------------------------------------------------------------------


def test_an_adapter_goes_from_either_program_to_the_other(tmp_path, capsys):
    """There, back, and into `look`."""
    flags = ["--max_steps", "2", "--learning_rate", "1e-2", "--warmup_steps", "0"]
    run(tmp_path / "trl", *flags)
    still = [*flags, "--learning_rate", "0", "--weight_decay", "0"]
    mini = [*FAST, *still, "--adapter", str(tmp_path / "trl" / "adapter"), "--output_dir", str(tmp_path / "mini")]
    assert sayo_mini.main(mini) == 0
    run(tmp_path / "again", *still, "--adapter", tmp_path / "mini" / "adapter")
    assert apart(adapter(tmp_path / "trl"), adapter(tmp_path / "mini")) == 0
    assert apart(adapter(tmp_path / "trl"), adapter(tmp_path / "again")) == 0
    run(tmp_path / "fresh", *still)
    assert apart(adapter(tmp_path / "trl"), adapter(tmp_path / "fresh")) > 1e-3
    config = [json.loads((tmp_path / name / "adapter" / "adapter_config.json").read_text()) for name in ("trl", "mini")]
    assert config[0] == config[1]
    capsys.readouterr()
    look = ["look", "--image", str(HERE / "example" / "one.png"), "--question", "What color is the dot on the card?",
            "--adapter", str(tmp_path / "trl" / "adapter"), "--output", str(tmp_path / "look.png")]  # fmt: skip
    assert sayo_mini.main(look) == 0
    assert "after training" in capsys.readouterr().out


# --- the command, and what it refuses --------------------------------------------------------------------------------


def test_the_documented_command(tmp_path):
    """In four bits, on a .jsonl, through the launcher; a second run in its folder is refused."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", "scale_trl.py",
               *FAST, "--load_in_4bit", "--dataset", "example/example.jsonl", "--max_steps", "1",
               "--output_dir", str(tmp_path / "run")]  # fmt: skip
    first, second = (subprocess.run(command, cwd=HERE, capture_output=True, text=True, timeout=120) for _ in range(2))
    assert first.returncode == 0, first.stderr
    assert {"adapter", "config.json", "metrics.jsonl", "checkpoint-1"} <= {p.name for p in (tmp_path / "run").iterdir()}
    assert second.returncode != 0 and f"scale_trl.py: {tmp_path / 'run'} holds a run already" in second.stderr


def refused(capfd, folder, word, *flags):
    """Exit code 2 and one line on stderr."""
    capfd.readouterr()
    run(folder, "--max_steps", "1", *flags, expect=2)
    err = capfd.readouterr().err
    assert err.startswith("scale_trl.py: ") and err.count("\n") == 1 and word in err, err
    return err.removeprefix("scale_trl.py: ").strip()


def test_sharded_weights_are_refused_in_the_words_of_the_readme(capfd, tmp_path, monkeypatch):
    readme = " ".join((HERE / "README.md").read_text().split())
    with monkeypatch.context() as patch:
        patch.setenv("ACCELERATE_USE_FSDP", "true")  # as `accelerate launch --use_fsdp` sets it
        assert refused(capfd, tmp_path / "run", "FSDP") in readme
    with monkeypatch.context() as patch:
        zero3 = SimpleNamespace(deepspeed_plugin=SimpleNamespace(zero_stage=3))  # a real one needs DeepSpeed
        patch.setattr(scale_trl, "GRPOConfig", lambda **settings: zero3)
        assert "ZeRO-2" in refused(capfd, tmp_path / "run", "ZeRO-3")
    assert not (tmp_path / "run").exists()
    sharded = torch.nn.Parameter(torch.zeros(1))
    sharded.ds_id = 7
    vlm = SimpleNamespace(model=SimpleNamespace(parameters=lambda: iter([sharded])))
    with pytest.raises(InputError, match="ZeRO-3"):
        scale_trl.SayoReward(vlm, None)


def test_answers_that_cannot_be_dealt_out_are_refused(capfd, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "5")
    refused(capfd, tmp_path / "run", "processes")


def test_one_programs_run_is_not_resumed_by_the_other(capfd, tmp_path):
    (tmp_path / "mini").mkdir()
    (tmp_path / "mini" / "checkpoint.safetensors").write_bytes(b"")
    (tmp_path / "mini" / "config.json").write_text("{}")
    refused(capfd, tmp_path / "mini", "sayo_mini.py", "--resume")
    (tmp_path / "trl" / "checkpoint-3").mkdir(parents=True)
    (tmp_path / "trl" / "checkpoint-3" / "trainer_state.json").write_text("{}")
    capfd.readouterr()
    assert sayo_mini.main([*FAST, "--resume", "--output_dir", str(tmp_path / "trl")]) == 2
    assert "scale_trl.py" in capfd.readouterr().err
    assert not (tmp_path / "trl" / "metrics.jsonl").exists()


def test_a_users_mistake_ends_in_one_line(capfd, tmp_path):
    refused(capfd, tmp_path / "run", "nowhere", "--adapter", tmp_path / "nowhere")
    refused(capfd, tmp_path / "run", "--beta", "--beta", "much")
    refused(capfd, tmp_path / "run", "--max_steps", "--max_steps", "0")
    (tmp_path / "file").write_text("")
    refused(capfd, tmp_path / "file" / "run", "file/run")


def test_it_is_as_short_as_promised():
    assert len((HERE / "scale_trl.py").read_text().splitlines()) < 150


if __name__ == "__main__":
    GRPOTrainer._generate_single_turn = deal
    runpy.run_path(str(HERE / "scale_trl.py"), run_name="__main__")
