"""The folder of one run. Its files are complete at every moment, even if the program is killed, and
a resumed run ends in the same bits as one that was never interrupted."""

import json
import os
import shlex
import shutil
import signal
import zlib
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from tqdm import tqdm

from config import InputError

CHECKPOINTS = "checkpoint.safetensors", "checkpoint-previous.safetensors"  # newest first
LOGS = "metrics.jsonl", "samples.jsonl"


class Stopped(Exception):
    """Ctrl-C or SIGTERM, at a point of a step where nothing has been updated yet."""


@contextmanager
def handle_signals(numbers, handler):
    """Handle these signals with `handler` for a while."""
    previous = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, old in previous.items():
            signal.signal(number, old)


@contextmanager
def stop_signals():
    """Ctrl-C and SIGTERM add to the list that is yielded instead of ending the program; the loop
    checks it between groups."""
    stop = []
    with handle_signals((signal.SIGINT, signal.SIGTERM), lambda *_: stop.append(1)):
        yield stop


class RunDirectory:
    """config.json, logs, two checkpoints, before.json, after.json, adapter/, pictures and report.

    The state of a run is the adapter, both moments of AdamW, the random generator and the number of
    steps made, from which the learning rate and the next examples follow. During training only
    `log` and `save` write.
    """

    def __init__(self, cfg, params, optimizer, generator):
        self.folder, self.resumed = Path(cfg.output_dir), cfg.resume
        self.params, self.optimizer, self.generator = params, optimizer, generator
        self.step = 0
        self.saved_step = None  # of the newest checkpoint
        self.skipped_in_a_row = 0
        self.memory_reduced = False
        with self.writing("the run"):
            self.folder.mkdir(parents=True, exist_ok=True)
        # Those of scale_trl.py, which resumes by itself.
        trl = any(self.folder.glob("checkpoint-*/trainer_state.json"))
        ours = any((self.folder / name).exists() for name in CHECKPOINTS)
        if trl if cfg.resume else ours:
            program = "scale_trl.py" if trl else "sayo_mini.py"
            raise InputError(f"{self.folder} holds a run of {program}: choose another --output_dir")
        if cfg.resume:
            self.restore()
        self.write_config(cfg)
        for name in LOGS:  # what was logged after the checkpoint will be logged again
            text = b"".join(line + b"\n" for line in self.logged_lines(name))
            self.atomic_write(name, lambda path, text=text: path.write_bytes(text))

    @contextmanager
    def writing(self, what):
        """Turn a failure to write, such as a full disk, into one line. The checkpoint stays."""
        try:
            yield
        except (OSError, SafetensorError) as error:
            reason = getattr(error, "strerror", None) or error
            raise InputError(
                f"cannot write {what} to --output_dir {self.folder}: {reason}; what was saved is "
                f"intact: make room, then {resume_command(self.folder)}"
            ) from None

    def atomic_write(self, name, write):
        """Call `write` with a temporary path, then rename that file or folder to `name`: there is
        the old one or the new one, never a part, even after a power cut."""
        unfinished, final = self.folder / f"unfinished-{name}", self.folder / name
        with self.writing(name):
            try:
                remove(unfinished)
                write(unfinished)
                for path in [unfinished, *unfinished.rglob("*")]:
                    sync(path)
                if final.is_dir():  # rename cannot replace a folder
                    shutil.rmtree(final)
                os.replace(unfinished, final)
                sync(self.folder)
            except BaseException:
                remove(unfinished)
                raise

    def write_json(self, name, content):
        self.atomic_write(name, lambda path: path.write_text(json.dumps(content)))
        return content

    def write_texts(self, texts):
        for name, text in texts.items():
            self.atomic_write(name, lambda path, text=text: path.write_text(text))

    def write_config(self, cfg):
        self.write_json("config.json", asdict(cfg) | {"resume": False})

    def read_json(self, name):
        """What an interrupted run wrote under `name`, or None."""
        path = self.folder / name
        try:
            return json.loads(path.read_text()) if self.resumed and path.exists() else None
        except (OSError, ValueError) as error:
            advice = "repair it, or start in another --output_dir"
            raise InputError(f"{path} is damaged ({error}): {advice}") from None

    def logged_lines(self, name):
        """The lines of a log up to the checkpoint's step. A kill can leave half a line behind."""
        path, kept = self.folder / name, []
        lines = path.read_bytes().split(b"\n") if path.exists() else []
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
                if row["step"] > self.step:
                    break
            except (ValueError, KeyError, TypeError):
                if number == len(lines):
                    break
                raise InputError(f"{path}:{number} is damaged: repair or remove it") from None
            kept.append(line)
            self.count_skipped(row)
        return kept

    def log(self, metrics, samples):
        """Append one step to the logs. Raises: InputError after ten skipped updates in a row."""
        self.step += 1
        for name, rows in zip(LOGS, ([metrics], samples)):
            with self.writing(name), open(self.folder / name, "a") as file:
                file.write("".join(json.dumps({"step": self.step} | row) + "\n" for row in rows))
        self.count_skipped(metrics)
        skipped = self.skipped_in_a_row
        if skipped:
            reason = f"loss or gradient not finite ({skipped} in a row)"
            tqdm.write(f"step {self.step}: update skipped, {reason}")
        if skipped >= 10:
            self.save()
            advice = "lower --learning_rate or try --no-load_in_4bit, in another --output_dir"
            raise InputError(f"stopped after step {self.step}: {reason}; {advice}")

    def count_skipped(self, row):
        if "skipped_updates" in row:  # a row of metrics, not of samples
            self.skipped_in_a_row = self.skipped_in_a_row + 1 if row["skipped_updates"] else 0

    @contextmanager
    def roll_back_on_interrupt(self):
        """Undo a step that stops halfway, then save. Nothing is updated before all of its groups
        are scored, so only the gradients and the random state have to be put back."""
        state = self.generator.get_state()
        try:
            yield
        except (Stopped, InputError, torch.OutOfMemoryError):
            self.optimizer.zero_grad()
            self.generator.set_state(state)
            self.save()
            raise

    def save(self):
        """Write a checkpoint of this step, and keep the one before."""
        if self.saved_step == self.step:
            return
        tensors = {"generator": self.generator.get_state()}
        for name, p in self.params.items():
            tensors |= {f"{name}|{k}": v.cpu() for k, v in self.optimizer.state[p].items()}
            tensors[f"{name}|value"] = p.detach().cpu()
        metadata = {"step": str(self.step), "checksum": checksum(tensors, self.step)}
        newest, previous = (self.folder / name for name in CHECKPOINTS)
        with self.writing("a checkpoint"):
            for name in LOGS:  # a checkpoint must not outlive the log of its steps
                sync(self.folder / name)
        content = save(tensors, metadata)

        def write(path):
            path.write_bytes(content)
            sync(path)
            if newest.exists():
                os.replace(newest, previous)

        self.atomic_write(newest.name, write)
        self.saved_step = self.step

    def restore(self):
        """Continue from the newest checkpoint that is intact."""
        found = [self.folder / name for name in CHECKPOINTS if (self.folder / name).exists()]
        if not found:
            return print(f"no checkpoint in {self.folder} yet: starting from the beginning")
        for path in found:
            try:
                step, tensors = load_checkpoint(path)
                break
            except Exception as error:  # a damaged file can raise anything
                print(f"{path} is damaged ({error}): using the previous one, if there is one")
        else:
            advice = "start again in another --output_dir"
            raise InputError(f"no checkpoint in {self.folder} is intact: {advice}")
        if path != found[0]:  # else the next save would keep the damaged one as the previous
            remove(found[0])
            os.replace(path, found[0])
        shapes = {f"{name}|value": p.shape for name, p in self.params.items()}
        if shapes != {name: t.shape for name, t in tensors.items() if name.endswith("|value")}:
            advice = "resume a run with its own settings"
            raise InputError(f"{path} is from another model or --lora_r: {advice}")
        self.step = self.saved_step = step
        self.generator.set_state(tensors.pop("generator"))
        for key, tensor in tensors.items():
            name, what = key.split("|")
            p = self.params[name]
            if what == "value":
                p.data.copy_(tensor)
            else:  # AdamW wants its step count on the CPU
                self.optimizer.state[p][what] = tensor if what == "step" else tensor.to(p.device)
        print(f"resuming {self.folder} after step {self.step}")


def resume_command(folder, program="python sayo_mini.py"):
    return f"{program} --resume --output_dir {shlex.quote(str(folder))}"


def load_checkpoint(path):
    """(step, tensors) of a checkpoint. Raises: some exception if it is not intact."""
    with safe_open(path, "pt") as saved:
        step = int(saved.metadata()["step"])
        tensors = {name: saved.get_tensor(name) for name in saved.keys()}
        if saved.metadata()["checksum"] != checksum(tensors, step):
            raise ValueError("its checksum differs")
    return step, tensors


def checksum(tensors, step):
    """CRC-32 of all bits, names, shapes and types; safetensors itself only checks sizes."""
    total = step
    for name, tensor in sorted(tensors.items()):
        total = zlib.crc32(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode(), total)
        total = zlib.crc32(tensor.contiguous().reshape(-1).view(torch.uint8).numpy(), total)
    return str(total)


def sync(path):
    """Wait until the disk has it."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def remove(path):
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
