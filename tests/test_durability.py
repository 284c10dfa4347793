"""Nothing is lost: kills, damaged files, signals, numbers that are not finite, full memory and full disks."""

import errno
import json
import math
import os
import resource
import signal
import sys
from pathlib import Path

import pytest
import torch
from conftest import TINY
from safetensors.torch import load_file

import model
import reward
import run as run_module
import sayo_mini
from bench.kill import COMPARED, differences, finish, kill_and_resume
from scenes import Scenes

FAST = ["--device", "cpu", "--no-load_in_4bit", "--prompts_per_step", "2", "--num_generations", "4", "--eval_examples",
        "1", "--max_steps", "4", "--save_steps", "1", "--model_name_or_path", str(TINY)]  # fmt: skip


def run(folder, *flags, expect=0):
    assert sayo_mini.main([*FAST, "--output_dir", str(folder), *map(str, flags)]) == expect


def resume(folder, expect=0):
    """With no other flag: the settings come from the run."""
    assert sayo_mini.main(["--resume", "--output_dir", str(folder)]) == expect


def steps(folder):
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def the_line(capfd):
    """The one line on stderr with which the program ended; progress bars aside."""
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("sayo_mini.py: ")]
    assert len(lines) == 1
    return lines[0]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    run(folder)
    return folder


# --- kills -----------------------------------------------------------------------------------------------------------


def test_twenty_sigkills_at_random_moments_change_no_bit(tmp_path):
    finish(tmp_path / "whole")
    logged = kill_and_resume(tmp_path / "cut", 20)
    assert len(logged) == 20 and any(0 < n < 16 for n in logged)  # some came in mid-run
    assert not differences(tmp_path / "whole", tmp_path / "cut")


def killed_at_write(folder, count):
    """A forked process runs the program and dies at its `count`-th flush or rename, before or in the middle of it.
    Returns its exit code: 9 if it died."""
    pid = os.fork()
    if pid == 0:
        left = [count]

        def deadly(original):
            def write(*args):
                left[0] -= 1
                if left[0] == 0:
                    os._exit(9)
                return original(*args)

            return write

        os.fsync, os.replace = deadly(os.fsync), deadly(os.replace)
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1), os.dup2(null, 2)
        os._exit(sayo_mini.main([*FAST, "--resume", "--output_dir", str(folder)]))
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_a_kill_at_every_write_changes_no_bit(tmp_path, whole):
    """Each process resumes what the one before left, and dies one flush or rename later in its life than that."""
    deaths = 0
    while (code := killed_at_write(tmp_path / "run", deaths + 1)) == 9:
        deaths += 1
    assert code == 0 and deaths > 20
    assert not differences(whole, tmp_path / "run")
    assert not list((tmp_path / "run").glob("unfinished-*"))


@pytest.mark.parametrize("log", ["metrics.jsonl", "samples.jsonl"])
def test_half_a_line_is_dropped_wherever_it_ends(tmp_path, whole, log):
    """Also where it happens to look complete: in a text that holds a brace."""
    folder = tmp_path / "run"
    run(folder, "--max_steps", 4, "--save_steps", 3)
    (folder / "checkpoint.safetensors").unlink()  # that of step 4; the one before it is of step 3
    text = (folder / log).read_text()
    (folder / log).write_text(text + '{"step": 5, "text": "{red}')
    resume(folder)
    assert not differences(whole, folder)


# --- damage ----------------------------------------------------------------------------------------------------------


def flip(path, where):
    content = bytearray(path.read_bytes())
    content[int(where * (len(content) - 1))] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "empty": lambda path: path.write_bytes(b""),
    "cut off": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "text": lambda path: path.write_text("no checkpoint"),
    "a bit in its length": lambda path: flip(path, 0),
    "a bit in its header": lambda path: flip(path, 0.001),
    "a bit in the middle": lambda path: flip(path, 0.5),
    "the last bit": lambda path: flip(path, 1),
    "another step": lambda path: path.write_bytes(path.read_bytes().replace(b'"step":"4"', b'"step":"3"')),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}


def copy(source, target):
    target.mkdir()
    for path in source.iterdir():
        if path.is_file():
            (target / path.name).write_bytes(path.read_bytes())
    settings = json.loads((target / "config.json").read_text()) | {"output_dir": str(target)}
    (target / "config.json").write_text(json.dumps(settings))
    return target


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_said_and_the_one_before_used(tmp_path, capsys, whole, damage):
    folder = copy(whole, tmp_path / "run")
    DAMAGE[damage](folder / "checkpoint.safetensors")
    resume(folder)
    said = capsys.readouterr().out
    assert "checkpoint.safetensors is damaged" in said and "after step 3" in said
    assert not differences(whole, folder)


def test_two_damaged_checkpoints_end_in_one_line_and_nothing_is_touched(tmp_path, capfd, whole):
    folder = copy(whole, tmp_path / "run")
    for name in run_module.CHECKPOINTS:
        flip(folder / name, 0.5)
    resume(folder, expect=2)
    assert str(folder) in the_line(capfd)
    assert steps(folder) == [1, 2, 3, 4]


def test_the_last_two_checkpoints_are_kept_and_the_damaged_one_is_not(tmp_path, whole):
    kept = [run_module.load_checkpoint(whole / name)[0] for name in run_module.CHECKPOINTS]
    assert kept == [4, 3]
    folder = copy(whole, tmp_path / "run")
    flip(folder / "checkpoint.safetensors", 0.5)
    resume(folder)  # step 4 is made again: the damaged file must not have become the one before
    assert [run_module.load_checkpoint(folder / name)[0] for name in run_module.CHECKPOINTS] == [4, 3]


def test_a_checkpoint_of_other_settings_is_refused(tmp_path, capfd, whole):
    folder = copy(whole, tmp_path / "run")
    assert sayo_mini.main(["--resume", "--output_dir", str(folder), "--lora_r", "4"]) == 2
    assert "--lora_r" in the_line(capfd)
    resume(folder)  # with its own it goes on
    assert not differences(whole, folder)


BROKEN = {
    "half a config": ("config.json", lambda text: text[: len(text) // 2], "config.json"),
    "a list as config": ("config.json", lambda text: "[]", "config.json"),
    "a setting nobody knows": ("config.json", lambda text: text.replace('"seed"', '"sead"'), "config.json"),
    "text for a number": ("config.json", lambda text: text.replace('"max_steps": 4', '"max_steps": "4"'), "config"),
    "half an evaluation": ("before.json", lambda text: text[: len(text) // 2], "before.json"),
    "a line of metrics": ("metrics.jsonl", lambda text: text.replace('"step": 2', '"step: 2'), "metrics.jsonl:2"),
    "a row that is none": ("metrics.jsonl", lambda text: text.replace('{"step": 1', '[]\n{"step": 1'), "jsonl:1"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_damaged_file_of_the_run_ends_in_one_line(tmp_path, capfd, whole, case):
    name, break_, word = BROKEN[case]
    folder = copy(whole, tmp_path / "run")
    text = (folder / name).read_text()
    assert break_(text) != text
    (folder / name).write_text(break_(text))
    resume(folder, expect=2)
    line = the_line(capfd)
    assert word in line and "damaged" in line


# --- signals ---------------------------------------------------------------------------------------------------------


def at_call(monkeypatch, owner, name, number, action):
    """Do `action` after the `number`-th call of `owner.name`. Returns the list of calls."""
    original, calls = getattr(owner, name), []

    def wrapped(*args, **kwargs):
        out = original(*args, **kwargs)
        calls.append(1)
        if len(calls) == number:
            action()
        return out

    monkeypatch.setattr(owner, name, wrapped)
    return calls


# (what is called, the how-manieth time the signal comes in it, steps made before it, calls in all). With one held-out
# question, `sample_groups` is called once before training, then once a step; `judge` twice, for each group.
MOMENTS = [
    ("sample_groups", 3, 1, 3),  # while the groups of step 2 are sampled
    ("judge", 3, 1, 3),
    ("judge", 4, 2, 4),  # while the last group of step 2 is judged: the step is finished
]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
@pytest.mark.parametrize("name, when, made, calls", MOMENTS)
def test_a_signal_ends_the_run_after_the_group_in_hand(
    tmp_path, capsys, monkeypatch, whole, name, when, made, calls, number
):
    owner = model.Vlm if name == "sample_groups" else sayo_mini
    seen = at_call(monkeypatch, owner, name, when, lambda: signal.raise_signal(number))
    folder = tmp_path / "a run"
    run(folder, "--save_steps", 4, expect=130)
    assert len(seen) == calls and steps(folder) == list(range(1, made + 1))
    assert f"stopped after step {made}; go on with: python sayo_mini.py --resume --output_dir '{folder}'" in (
        capsys.readouterr().out
    )
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL  # the next program in this process hears it again
    monkeypatch.undo()
    resume(folder)
    assert not differences(whole, folder)


def test_a_signal_between_two_updates_of_a_step_finishes_it(tmp_path, monkeypatch):
    """Half of its updates are made: it cannot be begun again."""
    flags = ["--num_iterations", "2", "--max_steps", "2"]
    run(tmp_path / "whole", *flags)
    at_call(monkeypatch, torch.optim.AdamW, "step", 1, lambda: signal.raise_signal(signal.SIGINT))
    run(tmp_path / "cut", *flags, expect=130)
    assert steps(tmp_path / "cut") == [1]
    monkeypatch.undo()
    resume(tmp_path / "cut")
    assert not differences(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
@pytest.mark.parametrize("when", [1, 6], ids=["before", "after"])  # four steps between the two
def test_a_signal_during_an_evaluation_stops_at_once(tmp_path, capsys, monkeypatch, whole, when, number):
    signal.signal(signal.SIGINT, signal.default_int_handler)
    at_call(monkeypatch, model.Vlm, "sample_groups", when, lambda: signal.raise_signal(number))
    folder = tmp_path / "run"
    run(folder, expect=130)
    assert f"stopped; go on with: python sayo_mini.py --resume --output_dir {folder}" in capsys.readouterr().out
    assert not (folder / ("before.json" if when == 1 else "after.json")).exists()
    monkeypatch.undo()
    resume(folder)
    assert not differences(whole, folder)


# --- not finite ------------------------------------------------------------------------------------------------------


def test_ten_steps_that_are_not_finite_end_the_run_with_advice(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(reward, "attention_reward", lambda attention, *args: torch.full(attention.shape[:1], math.nan))
    folder = tmp_path / "run"
    run(folder, "--max_steps", 7, "--save_steps", 9, "--eval_examples", 0)
    capfd.readouterr()
    assert sayo_mini.main(["--resume", "--output_dir", str(folder), "--max_steps", "20"]) == 2
    out, err = capfd.readouterr()
    assert "(8 in a row)" in out and "(10 in a row)" in out  # the count goes on where it was
    assert err.splitlines()[-1].startswith("sayo_mini.py: ") and "--learning_rate" in err.splitlines()[-1]
    assert steps(folder) == list(range(1, 11))
    assert all(json.loads(x)["skipped_updates"] == 1 for x in (folder / "metrics.jsonl").read_text().splitlines())
    assert run_module.load_checkpoint(folder / "checkpoint.safetensors")[0] == 10


def test_nine_in_a_row_do_not(tmp_path, monkeypatch):
    original, norms = torch.nn.utils.clip_grad_norm_, []

    def clip(*args):
        norms.append(original(*args))
        return norms[-1] * (1 if len(norms) == 10 else math.nan)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip)
    run(tmp_path / "run", "--max_steps", 12, "--eval_examples", 0, "--save_steps", 50)
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["skipped_updates"] for row in metrics] == [1] * 9 + [0] + [1] * 2


def test_an_infinite_loss_with_a_finite_gradient_is_no_update(tmp_path, monkeypatch):
    original = reward.grpo_loss
    monkeypatch.setattr(reward, "grpo_loss", lambda *args: (original(*args)[0] + math.inf, original(*args)[1]))
    run(tmp_path / "run", "--max_steps", 1, "--temperature", 2)
    row = json.loads((tmp_path / "run" / "metrics.jsonl").read_text())
    assert row["skipped_updates"] == 1 and math.isfinite(row["grad_norm"]) and row["grad_norm"] > 0
    saved = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert all((value == 0).all() for name, value in saved.items() if "lora_B" in name)


# --- memory ----------------------------------------------------------------------------------------------------------


def memory_for(monkeypatch, most):
    """A GPU with room for `most` completions in a training forward, the first aside: there is a gradient by then that
    may not be counted twice. Returns the sizes asked of it."""
    original, sizes = model.Vlm._score, []

    def _score(vlm, prompt, completions, attention):
        if torch.is_grad_enabled():
            sizes.append(len(completions.ids))
            if len(completions.ids) > most and len(sizes) > 1:
                raise torch.OutOfMemoryError("CUDA out of memory")
        return original(vlm, prompt, completions, attention)

    monkeypatch.setattr(model.Vlm, "_score", _score)
    return sizes


def test_out_of_memory_halves_a_forward_once(tmp_path, capsys, monkeypatch):
    flags = ["--temperature", 2, "--max_steps", 2]
    run(tmp_path / "halves", *flags, "--completions_per_forward", 2)
    sizes = memory_for(monkeypatch, 2)
    run(tmp_path / "run", *flags)
    assert sizes[:2] == [4, 4] and set(sizes[2:]) == {2}
    assert "--completions_per_forward 2" in capsys.readouterr().out
    assert json.loads((tmp_path / "run" / "config.json").read_text())["completions_per_forward"] == 2
    assert not differences(tmp_path / "halves", tmp_path / "run")  # nothing of the attempt is left


@pytest.mark.parametrize(
    "flags, asked",
    [([], [4, 4, 2]), (["--completions_per_forward", "1"], [1, 1]), (["--num_iterations", "2"], [4, 4])],
)
def test_out_of_memory_for_good_ends_in_one_line(tmp_path, capfd, monkeypatch, flags, asked):
    sizes = memory_for(monkeypatch, 0)
    run(tmp_path / "run", "--temperature", 2, *flags, expect=2)
    line = the_line(capfd)
    flags = ("--completions_per_forward", "--prompts_per_step", "--max_pixels", "--num_generations")
    assert all(flag in line for flag in flags)
    assert sizes == asked
    monkeypatch.undo()
    resume(tmp_path / "run")  # nothing was lost
    assert steps(tmp_path / "run") == [1, 2, 3, 4]


# --- disks -----------------------------------------------------------------------------------------------------------


def fill_disk():
    """From now on no file of this process may grow beyond 100 bytes: the write fails, as on a full disk."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))


def in_child(folder):
    """Run the program in a forked process, for which alone the disk is full. Returns: (exit code, its last line)."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.dup2(writer, 1), os.dup2(writer, 2)
        sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))
        os._exit(sayo_mini.main([*FAST, "--output_dir", str(folder)]))
    os.close(writer)
    with open(reader) as output:
        lines = output.read().splitlines()
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), lines[-1]


@pytest.mark.parametrize(
    "owner, name, when, word, last",
    [
        (sayo_mini, "train_step", 3, "metrics.jsonl", 2),
        (sayo_mini, "warn", 3, "checkpoint.safetensors", 2),  # after step 3 is logged, before it is saved
        (run_module.Run, "save", 4, "adapter", 4),  # safetensors writes it, and has an exception of its own
        (sayo_mini, "evaluate", 2, "after.json", 4),
    ],
)
def test_a_full_disk_stops_the_run_and_the_last_checkpoint_stands(
    tmp_path, monkeypatch, whole, owner, name, when, word, last
):
    at_call(monkeypatch, owner, name, when, fill_disk)
    folder = tmp_path / "run"
    code, line = in_child(folder)
    assert code == 2 and line.startswith("sayo_mini.py: ")
    assert word in line and str(folder) in line and "File too large" in line and "--resume" in line
    assert not list(folder.glob("unfinished-*"))
    assert run_module.load_checkpoint(folder / "checkpoint.safetensors")[0] == last
    monkeypatch.undo()
    resume(folder)
    assert not differences(whole, folder)


def test_a_disk_that_turns_read_only_stops_the_run_too(tmp_path, capfd, monkeypatch, whole):
    def read_only(*args):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    at_call(monkeypatch, sayo_mini, "train_step", 2, lambda: monkeypatch.setattr(os, "replace", read_only))
    folder = tmp_path / "run"
    run(folder, expect=2)
    assert "Read-only file system" in the_line(capfd)
    monkeypatch.undo()
    resume(folder)
    assert not differences(whole, folder)


# --- data and strangers' files ---------------------------------------------------------------------------------------


def pictures(folder, count=8):
    folder.mkdir()
    lines = []
    for i, example in enumerate(Scenes("train", count)[j] for j in range(count)):
        example.image.save(folder / f"{i}.png")
        lines.append({"image": f"{i}.png", "question": example.question, "answer": example.answer,
                      "boxes": example.boxes})  # fmt: skip
    (folder / "set.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder / "set.jsonl"


def test_an_image_that_proves_damaged_in_mid_run_saves_and_stops(tmp_path, capfd):
    """Its header is whole, so that only reading its pixels shows it."""
    data = pictures(tmp_path / "data")
    flags = ["--dataset", data, "--eval_examples", 0, "--save_steps", 9]
    run(tmp_path / "whole", *flags)
    third = json.loads((tmp_path / "whole" / "samples.jsonl").read_text().splitlines()[2 * 2 * 4])["id"]  # of step 3
    image = data.parent / f"{int(third.rsplit(':')[-1]) - 1}.png"
    content = image.read_bytes()
    image.write_bytes(content[:-200])
    capfd.readouterr()
    run(tmp_path / "cut", *flags, expect=2)
    line = the_line(capfd)
    assert third in line and image.name in line
    assert steps(tmp_path / "cut") == [1, 2]
    assert run_module.load_checkpoint(tmp_path / "cut" / "checkpoint.safetensors")[0] == 2
    image.write_bytes(content)
    resume(tmp_path / "cut")
    compared = [name for name in COMPARED if not name.endswith(".json")]
    for name in compared:
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_skipping_damaged_images_is_the_same_after_a_resume(tmp_path, capsys):
    data = pictures(tmp_path / "data")
    for i in (1, 4, 5):
        image = data.parent / f"{i}.png"
        image.write_bytes(image.read_bytes()[:-200])
    flags = ["--dataset", data, "--eval_examples", 2, "--skip_bad_examples"]
    run(tmp_path / "whole", *flags)
    said = capsys.readouterr().out
    assert all(said.count(f"set.jsonl:{i + 1}: ") == 1 for i in (1, 4, 5)) and "(3 so far)" in said
    run(tmp_path / "cut", *flags, "--max_steps", 2, "--lr_scheduler_type", "constant")
    run(tmp_path / "uncut", *flags, "--lr_scheduler_type", "constant")
    assert sayo_mini.main(["--resume", "--output_dir", str(tmp_path / "cut"), "--max_steps", "4"]) == 0
    assert not differences(tmp_path / "uncut", tmp_path / "cut")
    used = {json.loads(x)["id"] for x in (tmp_path / "whole" / "samples.jsonl").read_text().splitlines()}
    assert used and not used & {f"{data}:{i + 1}" for i in (1, 4, 5)}


class Trap:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_no_pickle_of_a_model_folder_is_loaded(tmp_path, capfd):
    folder = tmp_path / "model"
    folder.mkdir()
    for path in TINY.iterdir():
        if path.suffix in (".json", ".jinja", ".txt"):
            (folder / path.name).write_bytes(path.read_bytes())
    torch.save(Trap(tmp_path / "sprung"), folder / "pytorch_model.bin")
    run(tmp_path / "run", "--model_name_or_path", folder, expect=2)
    assert str(folder) in the_line(capfd) and not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json", "preprocessor_config.json"])
def test_no_code_of_a_model_folder_is_run_nor_is_that_asked(tmp_path, monkeypatch, file):
    folder = tmp_path / "model"
    folder.mkdir()
    for path in TINY.iterdir():
        if path.is_file():
            (folder / path.name).write_bytes(path.read_bytes())
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'sprung')!r}, 'w')\nclass Evil: pass\n")
    content = json.loads((folder / file).read_text())
    classes = {"AutoConfig": "evil.Evil", "AutoTokenizer": ["evil.Evil", None], "AutoImageProcessor": "evil.Evil",
               "AutoModelForImageTextToText": "evil.Evil"}  # fmt: skip
    content |= {"auto_map": classes} | ({"model_type": "evil"} if file == "config.json" else {})
    (folder / file).write_text(json.dumps(content))
    monkeypatch.setattr("builtins.input", lambda *args: "y")
    sayo_mini.main(
        [*FAST, "--max_steps", "0", "--model_name_or_path", str(folder), "--output_dir", str(tmp_path / "r")]
    )
    assert not (tmp_path / "sprung").exists()
