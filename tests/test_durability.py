"""Nothing is lost after kills, damaged files, signals, NaNs, full memory and full disks."""

import errno
import json
import math
import os
import pty
import resource
import select
import shlex
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import TINY
from safetensors.torch import load_file, save

import checkpoint
import model
import reward
import sayo_mini
from bench.kill import COMPARED, PHASES, count, differences, kill_and_resume
from config import Config, InputError
from runtime import checkpoint_file, run_folder
from sources.scenes import Scenes

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent

FAST = "--device cpu --no-load_in_4bit --prompts_per_step 2 --num_generations 4".split()
FAST += ["--completions_per_forward", "4"]  # one group per forward, as for large models
FAST += "--eval_examples 1 --max_steps 4 --save_steps 1 --model_name_or_path".split() + [str(TINY)]


def run(folder, flags="", expect=0):
    """Run the program in this process; check the exit code."""
    argv = [*FAST, "--output_dir", str(folder), *shlex.split(flags)]
    assert sayo_mini.main(argv) == expect


def resume(folder, flags="", expect=0):
    """Resume a run; settings that are not in `flags` come from the run."""
    argv = ["--resume", "--output_dir", str(folder), *shlex.split(flags)]
    assert sayo_mini.main(argv) == expect


def read_log(folder, name="metrics.jsonl"):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def logged_steps(folder):
    return [row["step"] for row in read_log(folder)]


def checkpoint_step(folder, name="checkpoint.safetensors"):
    return checkpoint.load_checkpoint(folder / name)[0]


def error_line(capfd):
    """The only line that the program itself wrote to stderr; progress bars do not count."""
    lines = capfd.readouterr().err.splitlines()
    lines = [line for line in lines if line.startswith("sayo_mini.py: ")]
    assert len(lines) == 1
    return lines[0]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    run(folder)
    return folder


# --- kills ---


@pytest.mark.slow
def test_results_are_bit_identical_after_twenty_kills_in_all_phases(tmp_path):
    kills, different = kill_and_resume(tmp_path, 20)
    assert len(kills) >= 20 and min(count(kills, phase) for phase in PHASES) >= 2
    assert not any(different.values())


def run_and_die_at_write(folder, count):
    """Run the program in a forked process that dies instead of its `count`-th fsync or rename.
    Returns: the exit code, 9 if the process died."""
    pid = os.fork()
    if pid == 0:
        remaining = [count]

        def die_at_zero(original):
            def write(*args):
                remaining[0] -= 1
                if remaining[0] == 0:
                    os._exit(9)
                return original(*args)

            return write

        os.fsync, os.replace = die_at_zero(os.fsync), die_at_zero(os.replace)
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1), os.dup2(null, 2)
        os._exit(sayo_mini.main([*FAST, "--resume", "--output_dir", str(folder)]))
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.slow
def test_results_are_bit_identical_after_a_kill_at_every_write(tmp_path, whole):
    """Each process resumes the run of the previous one and dies one write later."""
    deaths = 0
    while (code := run_and_die_at_write(tmp_path / "run", deaths + 1)) == 9:
        deaths += 1
    assert code == 0 and deaths > 20
    assert not differences(whole, tmp_path / "run")
    assert not list((tmp_path / "run").glob("unfinished-*"))


@pytest.mark.parametrize("log", ["metrics.jsonl", "samples.jsonl"])
def test_an_incomplete_last_line_of_a_log_is_dropped(tmp_path, whole, log):
    """The line is dropped even if it looks complete because its last character is a brace."""
    folder = tmp_path / "run"
    run(folder, "--max_steps 4 --save_steps 3")
    (folder / "checkpoint.safetensors").unlink()  # step 4; the previous one is from step 3
    text = (folder / log).read_text()
    (folder / log).write_text(text + '{"step": 5, "text": "{red}')
    resume(folder)
    assert not differences(whole, folder)


# --- damaged files ---


def flip_bit(path, fraction):
    """Flip a bit in the byte at this fraction of the file."""
    content = bytearray(path.read_bytes())
    content[int(fraction * (len(content) - 1))] ^= 1
    path.write_bytes(content)


def replace_bytes(path, old, new):
    path.write_bytes(path.read_bytes().replace(old, new))


DAMAGE = {
    "empty": lambda path: path.write_bytes(b""),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "text": lambda path: path.write_text("no checkpoint"),
    "a bit of its header's length": lambda path: flip_bit(path, 0),
    "a bit of its header": lambda path: flip_bit(path, 0.001),
    "a bit in the middle": lambda path: flip_bit(path, 0.5),
    "the last bit": lambda path: flip_bit(path, 1),
    "another step": lambda path: replace_bytes(path, b'"step":"4"', b'"step":"3"'),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}


def copy_run(source, target):
    target.mkdir()
    for path in source.iterdir():
        if path.is_file():
            (target / path.name).write_bytes(path.read_bytes())
    settings = json.loads((target / "config.json").read_text()) | {"output_dir": str(target)}
    (target / "config.json").write_text(json.dumps(settings))
    return target


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_checkpoint_is_reported_and_the_previous_one_used(tmp_path, capsys, whole, damage):
    folder = copy_run(whole, tmp_path / "run")
    DAMAGE[damage](folder / "checkpoint.safetensors")
    resume(folder)
    out = capsys.readouterr().out
    assert "checkpoint.safetensors is damaged" in out and "after step 3" in out
    assert not differences(whole, folder)


def test_two_damaged_checkpoints_are_an_error_and_nothing_changes(tmp_path, capfd, whole):
    folder = copy_run(whole, tmp_path / "run")
    for name in checkpoint.CHECKPOINTS:
        flip_bit(folder / name, 0.5)
    resume(folder, expect=2)
    assert str(folder) in error_line(capfd)
    assert logged_steps(folder) == [1, 2, 3, 4]


def test_two_checkpoints_are_kept_but_never_a_damaged_one(tmp_path, whole):
    assert [checkpoint_step(whole, name) for name in checkpoint.CHECKPOINTS] == [4, 3]
    folder = copy_run(whole, tmp_path / "run")
    flip_bit(folder / "checkpoint.safetensors", 0.5)
    resume(folder)  # repeats step 4; the damaged file must not become the previous checkpoint
    assert [checkpoint_step(folder, name) for name in checkpoint.CHECKPOINTS] == [4, 3]


def test_checkpoint_with_other_settings_is_refused(tmp_path, capfd, whole):
    folder = copy_run(whole, tmp_path / "run")
    resume(folder, "--lora_r 4", expect=2)
    assert "--lora_r" in error_line(capfd)
    resume(folder)  # with the run's own settings
    assert not differences(whole, folder)


def truncate(text):
    return text[: len(text) // 2]


BROKEN_CONFIGS = {
    "half": truncate,
    "a list": lambda text: "[]",
    "not UTF-8": lambda text: text.replace("cosine", "cosin\udcff"),
    "an unknown setting": lambda text: text.replace('"seed"', '"sead"'),
    "text for a number": lambda text: text.replace('"max_steps": 4', '"max_steps": "4"'),
}


def damage_config(folder, damage):
    text = (folder / "config.json").read_text()
    assert damage(text) != text
    (folder / "config.json").write_bytes(damage(text).encode(errors="surrogateescape"))


@pytest.mark.parametrize("case", BROKEN_CONFIGS)
def test_damaged_config_is_reported_and_the_checkpoints_settings_used(
    tmp_path, capsys, whole, case
):
    folder = copy_run(whole, tmp_path / "run")
    damage_config(folder, BROKEN_CONFIGS[case])
    resume(folder)
    out = capsys.readouterr().out
    assert f"{folder / 'config.json'} is damaged" in out and "settings in checkpoint.saf" in out
    assert not differences(whole, folder)


def forget_settings(path):
    """Rewrite a checkpoint as earlier versions saved it, without settings."""
    step, tensors = checkpoint.load_checkpoint(path)
    metadata = {"step": str(step), "checksum": checkpoint_file.checksum(tensors, step, "")}
    path.write_bytes(save(tensors, metadata))


def test_damaged_config_next_to_checkpoints_of_an_earlier_version(tmp_path, capfd, whole):
    """Following the advice in the message works."""
    folder = copy_run(whole, tmp_path / "run")
    for name in checkpoint.CHECKPOINTS:
        forget_settings(folder / name)
    damage_config(folder, truncate)
    resume(folder, expect=2)
    line = error_line(capfd)
    assert "delete it and run again with the run's own flags and --resume" in line
    (folder / "config.json").unlink()
    run(folder, "--resume")
    assert not differences(whole, folder)


def test_config_of_a_different_run_is_detected(tmp_path, capfd, whole):
    folder = copy_run(whole, tmp_path / "run")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"seed": 7, "learning_rate": 1.0}))
    resume(folder, expect=2)
    line = error_line(capfd)
    assert "learning_rate is 1.0 in config.json, but 0.0004 in checkpoint.safetensors" in line
    (folder / "config.json").unlink()  # as the message says
    resume(folder)
    assert not differences(whole, folder)


MISSING = {  # what was lost -> (how to lose it, a word of the message)
    "before.json": (lambda folder: (folder / "before.json").unlink(), "before.json"),
    "all of metrics.jsonl": (lambda folder: (folder / "metrics.jsonl").write_text(""), "metrics"),
    "metrics.jsonl": (lambda folder: (folder / "metrics.jsonl").unlink(), "metrics.jsonl"),
    "samples.jsonl": (lambda folder: (folder / "samples.jsonl").unlink(), "samples.jsonl"),
    "the last row": (
        lambda folder: (folder / "metrics.jsonl").write_text(
            "".join((folder / "metrics.jsonl").read_text().splitlines(True)[:-1])
        ),
        "metrics.jsonl",
    ),
    "the first row": (
        lambda folder: (folder / "metrics.jsonl").write_text(
            "".join((folder / "metrics.jsonl").read_text().splitlines(True)[1:])
        ),
        "metrics.jsonl",
    ),
}


@pytest.mark.parametrize("lost", MISSING)
def test_missing_parts_of_a_run_are_detected(tmp_path, capfd, whole, lost):
    folder = copy_run(whole, tmp_path / "run")
    lose, word = MISSING[lost]
    lose(folder)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    resume(folder, expect=2)
    line = error_line(capfd)
    assert word in line and "restore it" in line and "--output_dir" in line
    files["lock"] = b""
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == files


BROKEN_FILES = {  # case -> (file, the damage, a word of the message)
    "half an evaluation": ("before.json", truncate, "before.json"),
    "a broken line of metrics": (
        "metrics.jsonl",
        lambda text: text.replace('"step": 2', '"step: 2'),
        "metrics.jsonl:2",
    ),
    "a line that is not a row": (
        "metrics.jsonl",
        lambda text: text.replace('{"step": 1', '[]\n{"step": 1'),
        "jsonl:1",
    ),
}


@pytest.mark.parametrize("case", BROKEN_FILES)
def test_damaged_file_of_a_run_prints_one_error_line(tmp_path, capfd, whole, case):
    name, damage, word = BROKEN_FILES[case]
    folder = copy_run(whole, tmp_path / "run")
    text = (folder / name).read_text()
    assert damage(text) != text
    (folder / name).write_text(damage(text))
    resume(folder, expect=2)
    line = error_line(capfd)
    assert word in line and "damaged" in line


# --- signals ---


def do_after_call(monkeypatch, owner, name, count, action):
    """Do `action` after the `count`-th call of `owner.name`.
    Returns: a list that grows with each call."""
    original, calls = getattr(owner, name), []

    def wrapped(*args, **kwargs):
        out = original(*args, **kwargs)
        calls.append(1)
        if len(calls) == count:
            action()
        return out

    monkeypatch.setattr(owner, name, wrapped)
    return calls


# (function, call after which the signal comes, steps finished at the end, calls in total).
# With one held-out question, `sample_groups` is called once before training and once per step.
# `score_and_reward` is called twice per step, once per group.
MOMENTS = [
    ("sample_groups", 3, 1, 3),  # while the groups of step 2 are sampled
    ("score_and_reward", 3, 1, 3),  # while the first group of step 2 is scored
    ("score_and_reward", 4, 2, 4),  # while the last group is scored: the step is finished
]
NUMBERS = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
SIGNALS = pytest.mark.parametrize("number", NUMBERS, ids=lambda number: number.name)


@SIGNALS
@pytest.mark.parametrize("name, call, finished, calls", MOMENTS)
def test_signal_ends_the_run_after_the_current_group(
    tmp_path, capsys, monkeypatch, whole, name, call, finished, calls, number
):
    owner = model.Vlm if name == "sample_groups" else sayo_mini
    made = do_after_call(monkeypatch, owner, name, call, partial(signal.raise_signal, number))
    folder = tmp_path / "a run"  # the space requires quotes in the command
    run(folder, "--save_steps 4", expect=130)
    assert len(made) == calls and logged_steps(folder) == list(range(1, finished + 1))
    command = f"python sayo_mini.py --resume --output_dir '{folder}'"
    assert f"stopped after step {finished}; continue with: {command}" in capsys.readouterr().out
    # The signal handlers are restored for the next program in this process.
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    monkeypatch.undo()
    resume(folder)
    assert not differences(whole, folder)


def test_signal_between_two_updates_of_a_step_finishes_the_step(tmp_path, monkeypatch):
    """One of two updates has been applied, so the step cannot be rolled back."""
    flags = "--num_iterations 2 --max_steps 2"
    run(tmp_path / "whole", flags)
    stop = partial(signal.raise_signal, signal.SIGINT)
    do_after_call(monkeypatch, torch.optim.AdamW, "step", 1, stop)
    run(tmp_path / "stopped", flags, expect=130)
    assert logged_steps(tmp_path / "stopped") == [1]
    monkeypatch.undo()
    resume(tmp_path / "stopped")
    assert not differences(tmp_path / "whole", tmp_path / "stopped")


def test_out_of_memory_between_two_updates_saves_no_partial_step(tmp_path, monkeypatch):
    """The adapter is then between two steps, so the run resumes from the last checkpoint."""

    def out_of_memory():
        raise torch.OutOfMemoryError("CUDA out of memory")

    flags = "--num_iterations 2 --max_steps 2 --save_steps 2"
    run(tmp_path / "whole", flags)
    do_after_call(
        monkeypatch, torch.optim.AdamW, "step", 3, out_of_memory
    )  # first update of step 2
    run(tmp_path / "stopped", flags, expect=2)
    monkeypatch.undo()
    resume(tmp_path / "stopped")
    assert not differences(tmp_path / "whole", tmp_path / "stopped")


def test_out_of_memory_in_the_first_step_saves_no_partial_step(tmp_path, monkeypatch):
    def out_of_memory():
        raise torch.OutOfMemoryError("CUDA out of memory")

    do_after_call(monkeypatch, torch.optim.AdamW, "step", 1, out_of_memory)
    run(tmp_path / "run", "--num_iterations 2 --max_steps 2", expect=2)
    assert not (tmp_path / "run" / "checkpoint.safetensors").exists()


# `sample_groups` is called by the first evaluation, four steps, and the last evaluation.
@SIGNALS
@pytest.mark.parametrize("call, evaluation", [(1, "before"), (6, "after")], ids=["before", "after"])
def test_signal_during_an_evaluation_stops_immediately(
    tmp_path, capsys, monkeypatch, whole, call, evaluation, number
):
    signal.signal(signal.SIGINT, signal.default_int_handler)
    stop = partial(signal.raise_signal, number)
    do_after_call(monkeypatch, model.Vlm, "sample_groups", call, stop)
    folder = tmp_path / "run"
    run(folder, expect=130)
    command = f"python sayo_mini.py --resume --output_dir {folder}"
    assert f"stopped; continue with: {command}" in capsys.readouterr().out
    assert not (folder / f"{evaluation}.json").exists()
    monkeypatch.undo()
    resume(folder)
    assert not differences(whole, folder)


def test_a_second_ctrl_c_stops_immediately_and_keeps_the_checkpoint(
    tmp_path, capsys, monkeypatch, whole
):
    def press_twice():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    calls = do_after_call(monkeypatch, sayo_mini, "score_and_reward", 5, press_twice)
    folder = tmp_path / "run"
    run(folder, "--save_steps 2", expect=130)
    assert len(calls) == 5 and checkpoint_step(folder) == 2  # not saved again
    assert "stopped; continue with: python sayo_mini.py --resume" in capsys.readouterr().out
    monkeypatch.undo()
    resume(folder)
    assert not differences(whole, folder)


def test_repeating_other_signals_has_no_effect(tmp_path, monkeypatch):
    """A shell that loses its terminal may forward SIGHUP, which the kernel has already sent."""

    def hang_up():
        for number in (signal.SIGHUP, signal.SIGHUP, signal.SIGTERM):
            signal.raise_signal(number)

    do_after_call(monkeypatch, sayo_mini, "score_and_reward", 3, hang_up)
    run(tmp_path / "run", "--save_steps 9", expect=130)
    assert checkpoint_step(tmp_path / "run") == 1


def test_nohup_survives_a_hangup(tmp_path, monkeypatch, whole):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        hang_up = partial(signal.raise_signal, signal.SIGHUP)
        do_after_call(monkeypatch, sayo_mini, "score_and_reward", 3, hang_up)
        run(tmp_path / "run")
    finally:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
    assert not differences(whole, tmp_path / "run")


@pytest.mark.slow
def test_a_lost_terminal_saves_the_run(tmp_path, whole):
    """When an ssh connection drops, the kernel sends SIGHUP, and writing to the terminal fails."""
    folder = tmp_path / "run"
    argv = [*FAST, "--save_steps", "99", "--max_steps", "400", "--output_dir", str(folder)]
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(ROOT)
        os.execv(sys.executable, [sys.executable, "sayo_mini.py", *argv])
    log = folder / "metrics.jsonl"
    while not log.exists() or log.read_bytes().count(b"\n") < 2:
        if select.select([terminal], [], [], 0.05)[0]:
            os.read(terminal, 4096)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 130
    assert checkpoint_step(folder) == len(logged_steps(folder)) >= 2
    assert (folder / "report.html").exists()


def test_ctrl_c_while_torch_loads_prints_one_line():
    command = [sys.executable, "-X", "importtime", "sayo_mini.py", *FAST]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    program = subprocess.Popen(command, cwd=ROOT, **pipes)
    for line in program.stderr:
        if "torch." in line:
            break
    program.send_signal(signal.SIGINT)
    out, err = program.communicate(timeout=60)
    assert (program.returncode, out) == (130, "stopped; nothing was changed\n")
    assert "Traceback" not in err


# --- two processes ---


def test_two_processes_do_not_share_a_folder(tmp_path, capfd, whole):
    """The lock ends with its process, even if the process is killed."""
    folder = copy_run(whole, tmp_path / "run")
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        file = run_folder.lock(folder)
        os.write(writer, b"locked")
        signal.pause()
        os._exit(file.closed)
    os.read(reader, 6)
    try:
        for start in (run, resume):
            start(folder, expect=2)
            line = error_line(capfd)
            assert "another process is running" in line and str(folder) in line
        with pytest.raises(InputError, match="another process"):  # if two start at the same time
            checkpoint.RunDirectory(Config(output_dir=str(folder)), {}, None, None)
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    resume(folder)
    assert not differences(whole, folder)


def test_a_file_system_without_locks_is_accepted(tmp_path, monkeypatch):
    def fail(*args):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(run_folder.fcntl, "lockf", fail)
    run_folder.lock(tmp_path).close()


# --- other devices and operating systems ---


def test_resuming_a_gpu_run_on_the_cpu_prints_one_error_line(tmp_path, capfd, whole):
    folder = copy_run(whole, tmp_path / "run")
    for name in checkpoint.CHECKPOINTS:
        step, tensors = checkpoint.load_checkpoint(folder / name)
        tensors["generator"] = torch.zeros(16, dtype=torch.uint8)  # seed and offset, as on CUDA
        settings = run_folder.checkpoint_settings(folder / name)
        content = checkpoint_file.pack_checkpoint(step, tensors, settings)
        (folder / name).write_bytes(content)
    resume(folder, expect=2)
    line = error_line(capfd)
    assert "was made on cuda" in line and line.endswith("--device cuda")


def test_deterministic_changes_nothing_on_the_cpu(tmp_path, whole):
    run(tmp_path / "run", "--deterministic")
    assert torch.are_deterministic_algorithms_enabled()
    assert not differences(whole, tmp_path / "run")
    resume(whole)
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_run_on_windows(tmp_path, monkeypatch, whole):
    """Windows can neither open a folder nor sync a file that is open for reading only. Its default
    encoding is not UTF-8."""
    os_open, os_fsync, read_only = os.open, os.fsync, set()

    def windows_open(path, flags, *args, **kwargs):
        if os.path.isdir(path) and "dir_fd" not in kwargs:  # rmtree works differently on Windows
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        number = os_open(path, flags, *args, **kwargs)
        (read_only.discard if flags & (os.O_RDWR | os.O_WRONLY) else read_only.add)(number)
        return number

    def windows_fsync(number):
        if number in read_only:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        os_fsync(number)

    monkeypatch.setattr(os, "open", windows_open)
    monkeypatch.setattr(os, "fsync", windows_fsync)
    monkeypatch.setattr(run_folder, "WINDOWS", True)
    with pytest.raises(PermissionError):
        os.open(tmp_path, os.O_RDONLY)
    run(tmp_path / "run", "--max_steps 4 --save_steps 3")
    (tmp_path / "run" / "checkpoint.safetensors").unlink()
    resume(tmp_path / "run")
    assert not differences(whole, tmp_path / "run")


def test_tensors_of_a_checkpoint_do_not_keep_the_file_open(tmp_path, whole):
    """Windows cannot replace an open file."""
    step, tensors = checkpoint.load_checkpoint(whole / "checkpoint.safetensors")
    assert "checkpoint.safetensors" not in Path("/proc/self/maps").read_text()
    assert step == 4 and tensors


# --- other files of a run ---


def test_config_contains_versions_and_times_have_their_own_log(tmp_path, whole):
    config = json.loads((whole / "config.json").read_text())
    assert torch.__version__.startswith(config["made_with"]["torch"].split("+")[0])
    rows = read_log(whole, "timing.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert all(0 < row["seconds"] < 60 and row["peak_memory_mb"] > 50 for row in rows)
    assert "seconds" not in read_log(whole)[0]


# --- non-finite losses and gradients ---


def nan_rewards(attention, *args):
    """A replacement for `reward.attention_reward`."""
    return torch.full(attention.shape[:1], math.nan)


def test_ten_skipped_updates_in_a_row_end_the_run_with_advice(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(reward, "attention_reward", nan_rewards)
    folder = tmp_path / "run"
    run(folder, "--max_steps 7 --save_steps 9 --eval_examples 0", expect=2)  # all were skipped
    assert "stopped after step 7" in error_line(capfd)
    resume(folder, "--max_steps 20", expect=2)
    out, err = capfd.readouterr()
    assert "(8 in a row)" in out and "(10 in a row)" in out  # a resumed run continues the count
    last_line = err.splitlines()[-1]
    assert last_line.startswith("sayo_mini.py: ") and "--learning_rate" in last_line
    assert logged_steps(folder) == list(range(1, 11))
    assert all(row["skipped_updates"] == 1 for row in read_log(folder))
    assert checkpoint_step(folder) == 10


def test_nine_skipped_updates_in_a_row_do_not_end_the_run(tmp_path, monkeypatch):
    original, norms = torch.nn.utils.clip_grad_norm_, []

    def clip(*args):
        norms.append(original(*args))
        return norms[-1] * (1 if len(norms) == 10 else math.nan)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip)
    run(tmp_path / "run", "--max_steps 12 --eval_examples 0 --save_steps 50")
    skipped = [row["skipped_updates"] for row in read_log(tmp_path / "run")]
    assert skipped == [1] * 9 + [0] + [1] * 2


def test_infinite_loss_with_a_finite_gradient_is_skipped(tmp_path, monkeypatch):
    original = reward.grpo_loss

    def infinite_loss(*args):
        loss, stats = original(*args)
        return loss + math.inf, stats

    monkeypatch.setattr(reward, "grpo_loss", infinite_loss)
    run(tmp_path / "run", "--max_steps 1 --temperature 2", expect=2)
    (row,) = read_log(tmp_path / "run")
    assert row["skipped_updates"] == 1 and math.isfinite(row["grad_norm"]) and row["grad_norm"] > 0
    _, saved = checkpoint.load_checkpoint(tmp_path / "run" / "checkpoint.safetensors")
    untrained = [value for name, value in saved.items() if "lora_B" in name and "|value" in name]
    assert untrained and all((value == 0).all() for value in untrained)


# --- GPU memory ---


def limit_memory(monkeypatch, room):
    """Simulate a GPU with room for `room` completions in a forward pass with gradient.

    The first forward always fits, so a gradient exists when memory runs out, and the retry must not
    count it twice. Returns: a list that grows by the size of each such forward.
    """
    original, sizes = model.Vlm._score, []

    def _score(vlm, prompts, completions, attention):
        if torch.is_grad_enabled():
            sizes.append(sum(len(c.ids) for c in completions))
            if sizes[-1] > room and len(sizes) > 1:
                raise torch.OutOfMemoryError("CUDA out of memory")
        return original(vlm, prompts, completions, attention)

    monkeypatch.setattr(model.Vlm, "_score", _score)
    return sizes


def test_out_of_memory_halves_the_micro_batch(tmp_path, capsys, monkeypatch):
    flags = "--temperature 2 --max_steps 2"
    run(tmp_path / "halves", f"{flags} --completions_per_forward 2")
    sizes = limit_memory(monkeypatch, room=2)
    run(tmp_path / "run", flags)
    assert sizes[:2] == [4, 4] and set(sizes[2:]) == {2}
    assert "--completions_per_forward 2" in capsys.readouterr().out
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["completions_per_forward"] == 2
    # The failed attempt leaves no trace.
    assert not differences(tmp_path / "halves", tmp_path / "run")


def test_out_of_memory_halves_the_number_of_packed_groups(tmp_path, capsys, monkeypatch):
    """Two groups of four completions share a forward, until memory runs out."""
    sizes = limit_memory(monkeypatch, room=4)
    run(tmp_path / "run", "--temperature 2 --max_steps 2 --completions_per_forward 8")
    assert sizes[0] == 8 and set(sizes[2:]) == {4}
    assert "--completions_per_forward 4" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags, forwards",  # sizes of the forwards with gradient
    [
        ("", [4, 4, 2]),
        ("--completions_per_forward 1", [1, 1]),
        ("--num_iterations 2", [4, 4]),
    ],
)
def test_out_of_memory_without_remedy_prints_one_error_line(
    tmp_path, capfd, monkeypatch, flags, forwards
):
    sizes = limit_memory(monkeypatch, room=0)
    run(tmp_path / "run", f"--temperature 2 {flags}", expect=2)
    line = error_line(capfd)
    advice = "--completions_per_forward --prompts_per_step --max_pixels --num_generations"
    assert all(flag in line for flag in advice.split())
    assert sizes == forwards
    monkeypatch.undo()
    resume(tmp_path / "run")  # nothing was lost
    assert logged_steps(tmp_path / "run") == [1, 2, 3, 4]


# --- disks ---


def fill_disk():
    """Limit all files of this process to 100 bytes; longer writes fail, as on a full disk."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))


def run_in_fork(folder):
    """Run the program in a forked process, so that the disk is full only there.
    Returns: (its exit code, the last line of its output)."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.dup2(writer, 1), os.dup2(writer, 2)
        streams = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))
        sys.stdout, sys.stderr = streams
        os._exit(sayo_mini.main([*FAST, "--output_dir", str(folder)]))
    os.close(writer)
    with open(reader) as output:
        lines = output.read().splitlines()
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), lines[-1]


FULL_DISK = [  # owner, function, call after which the disk is full, failed file, checkpoint step
    (sayo_mini, "train_step", 3, "metrics.jsonl", 2),
    (sayo_mini, "print_alarms", 3, "checkpoint.safetensors", 2),  # step 3 is logged, not saved
    (checkpoint.RunDirectory, "save", 4, "adapter", 4),  # safetensors raises its own exception
    (sayo_mini, "evaluate", 2, "after.json", 4),
]


@pytest.mark.parametrize("owner, name, call, file, last_step", FULL_DISK)
def test_full_disk_stops_the_run_and_keeps_the_last_checkpoint(
    tmp_path, monkeypatch, whole, owner, name, call, file, last_step
):
    do_after_call(monkeypatch, owner, name, call, fill_disk)
    folder = tmp_path / "run"
    code, line = run_in_fork(folder)
    assert code == 2 and line.startswith("sayo_mini.py: ")
    assert all(word in line for word in (file, str(folder), "File too large", "--resume"))
    assert not list(folder.glob("unfinished-*"))
    assert checkpoint_step(folder) == last_step
    monkeypatch.undo()
    resume(folder)
    assert not differences(whole, folder)


def test_a_crash_in_the_first_evaluation_leaves_a_reusable_folder(tmp_path, monkeypatch):
    def crash(*args):
        raise ZeroDivisionError

    monkeypatch.setattr(sayo_mini, "evaluate", crash)
    with pytest.raises(ZeroDivisionError):
        run(tmp_path / "run")
    monkeypatch.undo()
    run(tmp_path / "run", "--seed 3")  # the corrected command
    assert json.loads((tmp_path / "run" / "config.json").read_text())["seed"] == 3
    run(tmp_path / "run", expect=2)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_folder_without_permission_is_refused_before_loading(tmp_path, capfd):
    tmp_path.chmod(0o500)
    run(tmp_path / "run", expect=2)
    assert "is not writable; use a different folder" in error_line(capfd)


def test_advice_fits_the_failure(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    for number, words in (
        (errno.ENOSPC, "free space, then run"),
        (errno.EROFS, "make the folder writable, then run"),
        (errno.EACCES, "make the folder writable, then run"),
    ):
        advice = run_folder.write_error_advice(OSError(number, ""), tmp_path)
        assert words in advice and "--resume" in advice
    advice = run_folder.write_error_advice(OSError(errno.EACCES, ""), tmp_path / "new")
    assert "use a different --output_dir" in advice


def test_disk_that_becomes_read_only_stops_the_run(tmp_path, capfd, monkeypatch, whole):
    def fail(*args):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    def make_read_only():
        monkeypatch.setattr(os, "replace", fail)

    do_after_call(monkeypatch, sayo_mini, "train_step", 2, make_read_only)
    folder = tmp_path / "run"
    run(folder, expect=2)
    line = error_line(capfd)
    assert "Read-only file system" in line and "make the folder writable" in line
    assert "free space" not in line
    monkeypatch.undo()
    resume(folder)
    assert not differences(whole, folder)


# --- images ---


def write_dataset(folder, count=8):
    """Write scenes as PNGs and a .jsonl file; return the path of the .jsonl file."""
    folder.mkdir()
    scenes, lines = Scenes("train", count), []
    for i in range(count):
        example = scenes[i]
        example.image.save(folder / f"{i}.png")
        row = {"image": f"{i}.png", "question": example.question, "answer": example.answer}
        lines.append(json.dumps(row | {"boxes": example.boxes}))
    (folder / "set.jsonl").write_text("\n".join(lines))
    return folder / "set.jsonl"


def damage_image(path):
    """Cut off the end of an image. Its header is intact: only reading the pixels fails."""
    content = path.read_bytes()
    path.write_bytes(content[:-200])
    return content


def test_damaged_image_during_a_run_saves_and_stops(tmp_path, capfd):
    data = write_dataset(tmp_path / "data")
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    flags = f"--dataset {data} --eval_examples 0 --save_steps 9"
    run(whole, flags)
    id = read_log(whole, "samples.jsonl")[2 * 2 * 4]["id"]  # the first example of step 3
    image = data.parent / f"{int(id.rsplit(':')[-1]) - 1}.png"
    content = damage_image(image)
    capfd.readouterr()
    run(stopped, flags, expect=2)
    line = error_line(capfd)
    assert id in line and image.name in line
    assert logged_steps(stopped) == [1, 2]
    assert checkpoint_step(stopped) == 2
    image.write_bytes(content)
    resume(stopped)
    for name in COMPARED:
        if not name.endswith(".json"):
            assert (stopped / name).read_bytes() == (whole / name).read_bytes()


@pytest.mark.slow
def test_resumed_run_skips_the_same_damaged_images(tmp_path, capsys):
    data = write_dataset(tmp_path / "data")
    damaged = 1, 4, 5
    for i in damaged:
        damage_image(data.parent / f"{i}.png")
    flags = f"--dataset {data} --eval_examples 2 --skip_bad_examples"
    run(tmp_path / "cosine", flags)
    out = capsys.readouterr().out
    assert all(out.count(f"set.jsonl:{i + 1}: ") == 1 for i in damaged) and "(3 so far)" in out
    constant = f"{flags} --lr_scheduler_type constant"  # independent of --max_steps
    run(tmp_path / "resumed", f"{constant} --max_steps 2")
    run(tmp_path / "whole", constant)
    resume(tmp_path / "resumed", "--max_steps 4")
    assert not differences(tmp_path / "whole", tmp_path / "resumed")
    used = {row["id"] for row in read_log(tmp_path / "cosine", "samples.jsonl")}
    assert used and not used & {f"{data}:{i + 1}" for i in damaged}


# --- untrusted model folders ---


class TouchesFile:
    """An object whose unpickling creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_pickle_in_a_model_folder_is_not_loaded(tmp_path, capfd):
    folder, canary = tmp_path / "model", tmp_path / "canary"
    folder.mkdir()
    for path in TINY.iterdir():
        if path.suffix in (".json", ".jinja", ".txt"):
            (folder / path.name).write_bytes(path.read_bytes())
    torch.save(TouchesFile(canary), folder / "pytorch_model.bin")
    run(tmp_path / "run", f"--model_name_or_path {folder}", expect=2)
    assert str(folder) in error_line(capfd) and not canary.exists()


@pytest.mark.parametrize(
    "file", ["config.json", "tokenizer_config.json", "preprocessor_config.json"]
)
def test_code_in_a_model_folder_is_not_run(tmp_path, monkeypatch, file):
    """The code is not run even if transformers asks the user, who says yes."""
    folder, canary = tmp_path / "model", tmp_path / "canary"
    folder.mkdir()
    for path in TINY.iterdir():
        if path.is_file():
            (folder / path.name).write_bytes(path.read_bytes())
    (folder / "evil.py").write_text(f"open({str(canary)!r}, 'w')\nclass Evil: pass\n")
    names = "AutoConfig", "AutoImageProcessor", "AutoModelForImageTextToText"
    classes = dict.fromkeys(names, "evil.Evil") | {"AutoTokenizer": ["evil.Evil", None]}
    content = json.loads((folder / file).read_text()) | {"auto_map": classes}
    if file == "config.json":
        content["model_type"] = "evil"
    (folder / file).write_text(json.dumps(content))
    monkeypatch.setattr("builtins.input", lambda *args: "y")
    flags = ["--max_steps", "0", "--model_name_or_path", str(folder)]
    sayo_mini.main([*FAST, *flags, "--output_dir", str(tmp_path / "run")])
    assert not canary.exists()


# --- --keep_best ---


def adapter_weights(folder):
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def test_keep_best_ends_with_the_adapter_of_the_best_steps(tmp_path, monkeypatch, capfd):
    """After steps 2, 4 and 5, the last two steps are compared by their right samples."""
    shares, seen, log = [0.2, 0.4, 0.6, 0.5, 0.1], [], checkpoint.RunDirectory.log

    def log_and_remember(self, metrics, samples):
        share = {"rewards/accuracy/mean": shares[self.step]}
        seen.append([p.detach().clone() for p in self.params.values()])
        log(self, metrics | share, samples)

    monkeypatch.setattr(checkpoint.RunDirectory, "log", log_and_remember)
    flags = "--max_steps 5 --save_steps 2 --learning_rate 1e-3 --warmup_steps 0"
    run(tmp_path / "best", f"{flags} --keep_best")
    assert "kept the adapter of step 4: 55% of its recent samples" in capfd.readouterr().out
    kept = adapter_weights(tmp_path / "best").values()
    assert sorted(w.sum().item() for w in kept) == sorted(w.sum().item() for w in seen[3])
    assert [w.sum() for w in seen[3]] != [w.sum() for w in seen[4]]
    run(tmp_path / "last", flags)
    last = adapter_weights(tmp_path / "last").values()
    assert sorted(w.sum().item() for w in last) == sorted(w.sum().item() for w in seen[4])


def test_the_best_adapter_survives_an_interruption(tmp_path):
    """Its weights are in the checkpoint, so it never comes from a step that was lost."""
    flags = "--keep_best --save_steps 2 --max_steps 6 --learning_rate 1e-3 --warmup_steps 0"
    run(tmp_path / "whole", flags)
    run(tmp_path / "run", flags)
    (tmp_path / "run" / "checkpoint.safetensors").unlink()  # step 6; step 4 is left
    for name in ("adapter/adapter_model.safetensors", "after.json"):
        (tmp_path / "run" / name).unlink()
    resume(tmp_path / "run")
    assert not differences(tmp_path / "whole", tmp_path / "run")
    resume(tmp_path / "run")  # a finished run
    assert not differences(tmp_path / "whole", tmp_path / "run")
