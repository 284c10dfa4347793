"""Nothing is lost after kills, damaged files, signals and full disks; a run resumes bit for bit."""

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from functools import partial

import pytest
import torch
from conftest import FAST, ROOT, adapter_weights, error_line, read_log, resume, run_program
from filelock import FileLock

import checkpoint
import model
import sayo_mini
from config import InputError
from metrics import Alarms

# One group per forward, as for large models.
FLAGS = "--completions_per_forward 4 --eval_examples 1 --max_steps 4 --save_steps 1"
COMPARED = "metrics.jsonl", "samples.jsonl", "before.json", "after.json"
COMPARED += "adapter/adapter_model.safetensors", "checkpoint.safetensors"


def run(folder, flags="", expect=0):
    run_program(folder, f"{FLAGS} {flags}", expect)


def differences(one, other):
    """The files of two runs that are not bit-identical."""
    return [name for name in COMPARED if (one / name).read_bytes() != (other / name).read_bytes()]


def logged_steps(folder):
    return [row["step"] for row in read_log(folder)]


def checkpoint_step(folder, name="checkpoint.safetensors"):
    return checkpoint.load_checkpoint(folder / name)[0]["step"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    run(folder)
    return folder


# --- resuming ---


@pytest.mark.parametrize("precision", ["", "--load_in_4bit"], ids=["fp32", "nf4"])
def test_a_crash_between_checkpoints_repeats_the_lost_step(tmp_path, monkeypatch, capfd, precision):
    """The run ends in step 4, with the last checkpoint at step 2. Step 3 is logged again. An error
    that nobody expected is one line, too."""
    flags = f"--save_steps 2 {precision}"
    run(tmp_path / "whole", flags)

    def power_cut():
        raise RuntimeError("power cut")

    do_after_call(monkeypatch, sayo_mini, "train_step", 4, power_cut)
    run(tmp_path / "run", flags, expect=2)
    line, trace = error_line(capfd), tmp_path / "run" / "traceback.txt"
    assert f": RuntimeError: power cut; traceback: {trace}; continue with: python" in line
    assert "in power_cut" in trace.read_text()
    assert logged_steps(tmp_path / "run") == [1, 2, 3]
    monkeypatch.undo()
    resume(tmp_path / "run")
    assert not differences(tmp_path / "whole", tmp_path / "run")


def test_a_run_can_grow_but_not_shrink_or_change(tmp_path, capfd, whole):
    folder = shutil.copytree(whole, tmp_path / "run")
    for flags in ("--seed 1", "--lora_r 4", "--reward_weights format=1", "--max_steps 3"):
        resume(folder, flags, expect=2)
        assert flags.split()[0] in error_line(capfd)
    assert not differences(whole, folder)
    resume(folder, "--max_steps 5 --save_steps 3 --seed 0")
    out = capfd.readouterr().out
    assert "max_steps 4 -> 5" in out and "save_steps 1 -> 3" in out and "seed" not in out
    assert logged_steps(folder) == [1, 2, 3, 4, 5] and checkpoint_step(folder) == 5
    config = json.loads((folder / "config.json").read_text())
    assert (config["max_steps"], config["resume"]) == (5, False)


def test_a_run_is_not_overwritten_and_no_other_run_is_resumed(tmp_path, capfd, whole):
    folder = shutil.copytree(whole, tmp_path / "run")
    capfd.readouterr()
    run(folder, expect=2)
    assert "already contains a run: --resume continues it" in error_line(capfd)
    assert not differences(whole, folder)
    for text in ("{", "{}", "[" * 100_000):
        (folder / "config.json").write_text(text)
        resume(folder, expect=2)
        assert f"no run in {folder}: cannot read config.json" in error_line(capfd)
    trl = tmp_path / "trl"
    (trl / "checkpoint-2").mkdir(parents=True)
    (trl / "checkpoint-2" / "trainer_state.json").touch()
    run(trl, expect=2)
    assert "already contains checkpoint-2" in error_line(capfd)
    (trl / "config.json").write_text((whole / "config.json").read_text())
    resume(trl, expect=2)
    assert "a run of extras/scale_trl.py" in error_line(capfd)


def test_a_crash_in_the_first_evaluation_leaves_a_reusable_folder(tmp_path, monkeypatch, whole):
    """The second run must not take the leftovers of the first, which had another seed."""
    monkeypatch.setattr(sayo_mini, "train_step", None)  # raises TypeError
    run(tmp_path / "run", "--seed 5 --eval_examples 2", expect=2)
    monkeypatch.undo()
    run(tmp_path / "run")
    assert not differences(whole, tmp_path / "run")


# --- damaged files ---


def flip_bit(content, fraction):
    """Flip a bit in the byte at this fraction of the content of a file."""
    place = int(fraction * (len(content) - 1))
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


DAMAGE = {  # of the content of a file
    "truncated": lambda content: content[:-1],
    "a bit of its header": lambda content: flip_bit(content, 0.001),
    "the last bit": lambda content: flip_bit(content, 1),
    "another step": lambda content: content.replace(b'"step": 4', b'"step": 3'),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_checkpoint_is_reported_and_the_previous_one_used(tmp_path, capsys, whole, damage):
    """Two checkpoints are kept. A damaged one must not become the previous one."""
    folder = shutil.copytree(whole, tmp_path / "run")
    path = folder / "checkpoint.safetensors"
    path.write_bytes(DAMAGE[damage](path.read_bytes()))
    resume(folder)
    out = capsys.readouterr().out
    assert "checkpoint.safetensors is damaged" in out and "after step 3" in out
    assert not differences(whole, folder)
    assert [checkpoint_step(folder, name) for name in checkpoint.CHECKPOINTS] == [4, 3]


def test_two_damaged_checkpoints_are_an_error_and_nothing_changes(tmp_path, capfd, whole):
    folder = shutil.copytree(whole, tmp_path / "run")
    for name in checkpoint.CHECKPOINTS:
        (folder / name).write_bytes(flip_bit((folder / name).read_bytes(), 0.5))
    resume(folder, expect=2)
    assert f"no checkpoint in {folder} is intact" in error_line(capfd)
    assert logged_steps(folder) == [1, 2, 3, 4]


EDITS = {  # what happened to a file -> its lines; None: it is missing
    "missing": None,
    "a row is missing": lambda rows: [rows[0], *rows[2:]],
    "two rows are swapped": lambda rows: [rows[1], rows[0], *rows[2:]],
    "another image": lambda rows: [rows[0].replace('"image": ', '"image": 1')],
}
PARTS = [(name, edit) for name in checkpoint.LOGS for edit in EDITS if edit != "another image"]
PARTS += [("before.json", "missing"), ("before.json", "another image")]


@pytest.mark.parametrize("name, edit", PARTS)
def test_missing_parts_of_a_run_are_detected(tmp_path, capfd, whole, name, edit):
    folder = shutil.copytree(whole, tmp_path / "run")
    if EDITS[edit] is None:
        (folder / name).unlink()
    else:
        lines = (folder / name).read_text().splitlines(True)
        (folder / name).write_text("".join(EDITS[edit](lines)))
    files = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    resume(folder, expect=2)
    line = error_line(capfd)
    assert name in line and "--output_dir" in line
    assert files == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- signals ---


def do_after_call(monkeypatch, owner, name, count, action):
    """Do `action` after the `count`-th call of `owner.name`."""
    original, calls = getattr(owner, name), []

    def wrapped(*args, **kwargs):
        out = original(*args, **kwargs)
        calls.append(1)
        if len(calls) == count:
            action()
        return out

    monkeypatch.setattr(owner, name, wrapped)


@pytest.mark.parametrize(
    "number, owner, name, call, step, stopped",
    [
        (signal.SIGINT, sayo_mini, "score_and_reward", 3, 2, " after step 2"),
        (signal.SIGTERM, sayo_mini, "score_and_reward", 3, 2, " after step 2"),
        (signal.SIGHUP, sayo_mini, "score_and_reward", 3, 2, " after step 2"),
        (signal.SIGINT, Alarms, "check", 2, 2, " after step 2"),  # between steps 2 and 3
        (signal.SIGINT, model.Vlm, "sample_groups", 6, 4, ""),  # in the last evaluation
        ("twice", sayo_mini, "score_and_reward", 5, 2, ""),  # in step 3, which is lost
    ],
)
def test_a_signal_ends_the_run_after_the_current_step_and_otherwise_immediately(
    tmp_path, capsys, monkeypatch, whole, number, owner, name, call, step, stopped
):
    def press():
        for each in [signal.SIGINT] * 2 if number == "twice" else [number]:
            signal.raise_signal(each)

    do_after_call(monkeypatch, owner, name, call, press)
    folder = tmp_path / "run"
    run(folder, f"--save_steps {9 if stopped else 2}", expect=130)
    command = f"python sayo_mini.py --resume --output_dir {folder}"
    assert f"stopped{stopped}; continue with: {command}" in capsys.readouterr().out
    assert logged_steps(folder)[-1] == checkpoint_step(folder) == step
    assert (folder / "report.html").exists() == bool(stopped)
    assert not (folder / "after.json").exists()
    assert (folder / "adapter").exists() == (step == 4)
    monkeypatch.undo()
    resume(folder)
    assert not differences(whole, folder)


def test_settings_that_an_earlier_run_wrote_are_not_offered_for_resuming(tmp_path):
    (tmp_path / "config.json").touch()
    assert "--resume" in sayo_mini.continue_hint(str(tmp_path), started=0)
    assert sayo_mini.continue_hint(str(tmp_path), started=1e12) == "; nothing new was saved"


# --- other files ---


@pytest.mark.parametrize("name", ["metrics.jsonl", "adapter", "config.json", "lock", "notes.txt"])
def test_a_new_run_never_writes_into_a_folder_with_other_files(tmp_path, name):
    checkpoint.check_folder(tmp_path, started=False)
    for file in ("metrics.jsonl", "lock"):  # of a run that ended before its first step
        (tmp_path / file).touch()
    checkpoint.check_folder(tmp_path, started=False)
    (tmp_path / name).write_text('{"model_type": "qwen3_vl"}')
    for started in (False, True):
        with pytest.raises(InputError, match=f"{tmp_path} already contains {name}: "):
            checkpoint.check_folder(tmp_path, started)


@pytest.mark.parametrize("name", ["metrics.jsonl", "timing.jsonl", "adapter"])
def test_links_in_the_folder_of_a_run_are_not_followed(tmp_path, capfd, whole, name):
    folder = shutil.copytree(whole, tmp_path / "run")
    (folder / name).rename(tmp_path / name)
    (folder / name).symlink_to(tmp_path / name)
    resume(folder, "--max_steps 5", expect=2)
    assert f"{folder / name} is a link: " in error_line(capfd)


@pytest.mark.parametrize("name", ["checkpoint.safetensors", "after.json"])
def test_a_folder_with_the_name_of_a_file_is_kept(tmp_path, capfd, whole, name):
    folder = shutil.copytree(whole, tmp_path / "run")
    (folder / name).unlink()
    (folder / name).mkdir()
    (folder / name / "mine.txt").touch()
    resume(folder, expect=2)
    assert name in error_line(capfd) and (folder / name / "mine.txt").exists()


def test_permissions_follow_the_umask(tmp_path):
    previous = os.umask(0o027)
    try:
        run(tmp_path / "run", "--max_steps 1")
    finally:
        os.umask(previous)
    files = {p: oct(p.stat().st_mode & 0o777) for p in (tmp_path / "run").rglob("*") if p.is_file()}
    assert set(files.values()) == {"0o640"}, files


def test_a_resumed_run_uses_as_many_threads_as_before(tmp_path, whole):
    folder = shutil.copytree(whole, tmp_path / "run")
    config = json.loads((folder / "config.json").read_text())
    assert config["threads"] == torch.get_num_threads() == 1
    (folder / "config.json").write_text(json.dumps(config | {"threads": 2}))
    try:
        resume(folder)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


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
@pytest.mark.parametrize("stdout", ["head", "/dev/full"])
def test_lost_output_does_not_stop_a_run(tmp_path, stdout):
    """The name of the data set cannot be shown in ASCII."""
    folder = shutil.copytree(ROOT / "example", tmp_path / "set")
    data = (folder / "example.jsonl").rename(folder / "où.jsonl")
    flags = [*FAST, *FLAGS.split(), "--dataset", str(data), "--output_dir", str(tmp_path / "run")]
    reader, pipe = os.pipe()
    output = pipe if stdout == "head" else open("/dev/full", "w")
    os.close(reader)  # nobody reads the pipe
    env = os.environ | {"PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "sayo_mini.py", *flags]
    assert not subprocess.call(command, cwd=ROOT, stdout=output, stderr=output, env=env)
    assert logged_steps(tmp_path / "run") == [1, 2, 3, 4]
    assert "où.jsonl" in (tmp_path / "run" / "report.html").read_text()


def test_two_runs_do_not_share_a_folder(tmp_path, capfd, whole):
    folder = shutil.copytree(whole, tmp_path / "run")
    with FileLock(folder / "lock"):
        resume(folder, expect=2)
    assert f"another process runs in {folder}: wait" in error_line(capfd)
    resume(folder)
    assert not differences(whole, folder)


def test_a_run_ends_if_another_takes_over_after_the_lock_file_was_removed(
    tmp_path, monkeypatch, capfd, whole
):
    folder = tmp_path / "run"

    def take_over():
        (folder / "lock").unlink()
        pid = os.fork()
        if pid == 0:
            os._exit(sayo_mini.main(["--resume", "--output_dir", str(folder)]))
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0

    do_after_call(monkeypatch, sayo_mini, "score_and_reward", 5, take_over)  # in step 3
    run(folder, expect=2)
    assert "another process continues the run" in error_line(capfd)
    assert not differences(whole, folder)


def limit_files(size):
    """Make writes beyond this size fail in this process, as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


FULL_DISK = [  # owner, function, call after which the disk is full, checkpoint step
    (sayo_mini, "train_step", 3, 2),
    (checkpoint.RunDirectory, "save", 4, 4),
    (sayo_mini, "evaluate", 2, 4),
]


@pytest.mark.parametrize("owner, name, call, last_step", FULL_DISK)
def test_full_disk_stops_the_run_and_keeps_the_last_checkpoint(
    tmp_path, monkeypatch, capsys, whole, owner, name, call, last_step
):
    do_after_call(monkeypatch, owner, name, call, partial(limit_files, 100))
    folder = tmp_path / "run"
    try:
        run(folder, expect=2)
    finally:
        limit_files(resource.RLIM_INFINITY)
    line = capsys.readouterr().err.splitlines()[-1]
    for word in ("sayo_mini.py: ", "File too large", f"--resume --output_dir {folder}"):
        assert word in line
    assert not list(folder.glob("unfinished-*"))
    assert checkpoint_step(folder) == last_step
    monkeypatch.undo()
    resume(folder)
    assert not differences(whole, folder)


def test_data_that_changed_are_not_resumed_and_answers_may_be_lists(tmp_path, capfd):
    folder, own = tmp_path / "run", tmp_path / "own.py"
    data = shutil.copytree(ROOT / "example", tmp_path / "data") / "example.jsonl"
    lists = re.sub(r'"answer": ("\w+")', r'"answer": ["nothing", \1]', data.read_text())
    data.write_text(lists)
    own.write_text("def one(x):\n    return x.lengths\n")
    reward = f"--reward {own}:one --reward_weights attention=1,one=1"
    run(folder, f"--dataset {data} --max_steps 1 {reward}")
    (before, *_), samples = read_log(folder, "before.json")[0], read_log(folder, "samples.jsonl")
    assert all(row["answer"][0] == "nothing" for row in (before, *samples))
    assert "nothing or " in (folder / "report.html").read_text()
    files = f"{data} or its images"
    for path, what in ((data, files), (data.parent / "three.png", files), (own, own)):
        saved = path.read_bytes()
        path.write_bytes(saved.replace(b"nothing", b"x", 1) + b"\n")
        resume(folder, "--max_steps 2", expect=2)
        assert f"{what} changed since the run in {folder} began: restore" in error_line(capfd)
        path.write_bytes(saved)
    data.write_bytes(data.read_bytes().replace(b"\n", b"\n\n"))  # the same rows
    resume(folder, "--max_steps 2")
    assert logged_steps(folder) == [1, 2]


# --- --keep_best and --report_to ---


def sums(tensors):
    return sorted(tensor.sum().item() for tensor in tensors)


def test_files_of_a_run_are_stored_by_their_whole_path(tmp_path, monkeypatch):
    """So that it can be resumed from another folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    names = {"dataset": "a.jsonl", "eval_dataset": "b.jsonl", "reward": "mine.py:one"}
    names["model_name_or_path"] = "model"
    flags = {"output_dir": "run", "reward_weights": "one=1"}
    cfg = checkpoint.run_config(names | flags)
    assert all(getattr(cfg, name) == f"{tmp_path}/{value}" for name, value in names.items())
    hub = {"model_name_or_path": "Qwen/Qwen3-VL-2B-Instruct", "output_dir": "run"}
    assert checkpoint.run_config(hub).model_name_or_path == hub["model_name_or_path"]


def test_keep_best_ends_with_the_adapter_of_the_best_steps(tmp_path, monkeypatch, capsys):
    """After steps 2, 4, 6 and 7, the latest steps are compared by their right samples. On average
    0.6, 0.6, 0.5 and 0.6 of them are right. The later of the best wins; a single step does not."""
    shares = [0.7, 0.5, 0.6, 0.6, 0.9, 0.1, 0.6]
    seen, train_step = [], sayo_mini.train_step

    def step_and_remember(vlm, examples, cfg, optimizer, *args):
        metrics, samples = train_step(vlm, examples, cfg, optimizer, *args)
        metrics["rewards/accuracy/mean"] = shares[len(seen)]
        seen.append(sums(optimizer.param_groups[0]["params"]))
        return metrics, samples

    monkeypatch.setattr(sayo_mini, "train_step", step_and_remember)
    flags = "--max_steps 7 --save_steps 2 --learning_rate 1e-3 --warmup_steps 0"
    for name, keep, step in (("best", "--keep_best", 4), ("last", "", 7)):
        seen.clear()
        run(tmp_path / name, f"{flags} {keep}")
        assert seen[step - 1] == sums(adapter_weights(tmp_path / name).values())
        assert len(set(map(tuple, seen))) == 7
        assert ("step 4: the best so far" in capsys.readouterr().out) == (name == "best")


def test_the_best_adapter_survives_an_interruption(tmp_path):
    flags = "--keep_best --save_steps 2 --max_steps 6 --learning_rate 1e-3 --warmup_steps 0"
    run(tmp_path / "whole", flags)
    run(tmp_path / "run", flags)
    resume(tmp_path / "run", "--save_steps 3", expect=2)  # other steps would be compared
    (tmp_path / "run" / "checkpoint.safetensors").unlink()  # step 6; step 4 is left
    for name in ("adapter/adapter_model.safetensors", "after.json"):
        (tmp_path / "run" / name).unlink()
    resume(tmp_path / "run")
    assert not differences(tmp_path / "whole", tmp_path / "run")
    (tmp_path / "run" / "checkpoint.safetensors").unlink()
    shutil.rmtree(tmp_path / "run" / "best")  # a kill can leave none
    resume(tmp_path / "run")


def test_report_to_writes_to_the_tracker_or_says_what_to_install(tmp_path, capfd):
    pytest.importorskip("tensorboard")
    run(tmp_path / "run", "--max_steps 1 --report_to tensorboard")
    events = list((tmp_path / "run").rglob("events.out.tfevents.*"))
    assert any(b"rewards/attention/mean" in path.read_bytes() for path in events)
    before_a_step = tmp_path / "new"
    (before_a_step / "sayo-mini").mkdir(parents=True)
    (before_a_step / "config.json").write_text('{"reward_weights": ""}')
    checkpoint.check_folder(before_a_step, started=False)  # a new run may replace it
    run(tmp_path / "other", "--report_to trackio", expect=2)
    assert "pip install trackio" in error_line(capfd)
