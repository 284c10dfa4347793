"""The folder of one run: what is in it is whole, whatever moment the program is killed at, and a run goes on from it
to the same bits that it would have reached uninterrupted."""

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

from data import InputError

CHECKPOINTS = "checkpoint.safetensors", "checkpoint-previous.safetensors"  # the last and the one before


class Stopped(Exception):
    """Ctrl-C or SIGTERM, between two groups of a step of which nothing was updated yet."""


@contextmanager
def signals():
    """A list that Ctrl-C and SIGTERM add to, instead of ending the program; the loop looks at it between groups."""
    stop = []
    usual = {number: signal.signal(number, lambda *_: stop.append(1)) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in usual.items():
            signal.signal(number, handler)


class Run:
    """config.json, metrics.jsonl, samples.jsonl, two checkpoints, before.json, after.json, adapter/ and look.png.

    Of a step only `log` and `save` write. The state of a run is the adapter, both moments of AdamW, the one source of
    randomness and the number of steps made: the learning rate and the next examples follow from that number.
    """

    def __init__(self, cfg, params, optimizer, generator):
        self.folder, self.params, self.optimizer, self.generator = Path(cfg.output_dir), params, optimizer, generator
        self.step, self.resumed = 0, cfg.resume
        self.saved = None  # the step of the last checkpoint
        self.skipped = 0  # steps in a row that were skipped
        self.halved = False  # whether memory has been short already
        with self.writing("the run"):
            self.folder.mkdir(parents=True, exist_ok=True)
        theirs = list(self.folder.glob("checkpoint-*/trainer_state.json"))  # of scale_trl.py, which resumes by itself
        if theirs if cfg.resume else any((self.folder / name).exists() for name in CHECKPOINTS):
            whose = "scale_trl.py" if theirs else "sayo_mini.py"
            raise InputError(f"{self.folder} holds a run of {whose}: choose another --output_dir")
        if cfg.resume:
            self.restore()
        self.keep_config(cfg)
        for name in ("metrics.jsonl", "samples.jsonl"):  # what was logged after the checkpoint will be logged again
            kept = self.logged(name)
            self.replace(name, lambda path, kept=kept: path.write_bytes(b"".join(line + b"\n" for line in kept)))

    @contextmanager
    def writing(self, what):
        """A full disk or one that turned read-only ends the run in one line; the last checkpoint stands."""
        try:
            yield
        except (OSError, SafetensorError) as error:
            reason = getattr(error, "strerror", None) or error
            raise InputError(
                f"cannot write {what} to --output_dir {self.folder}: {reason}; what was saved there stands: "
                f"make room, then {how_to_go_on(self.folder)}"
            ) from None

    def replace(self, name, write):
        """Let `write` make a file (or folder) of another name, then rename it: there is the old one or the new one, no
        half, even after a power cut."""
        unfinished, final = self.folder / f"unfinished-{name}", self.folder / name
        with self.writing(name):
            try:
                remove(unfinished)
                write(unfinished)
                for path in [unfinished, *unfinished.rglob("*")]:
                    sync(path)
                if final.is_dir():  # a folder cannot take another's place
                    shutil.rmtree(final)
                os.replace(unfinished, final)
                sync(self.folder)
            except BaseException:
                remove(unfinished)
                raise

    def keep(self, name, content):
        self.replace(name, lambda path: path.write_text(json.dumps(content)))
        return content

    def publish(self, texts):
        for name, text in texts.items():
            self.replace(name, lambda path, text=text: path.write_text(text))

    def keep_config(self, cfg):
        self.keep("config.json", asdict(cfg) | {"resume": False})

    def read(self, name):
        """What an interrupted run kept under `name`, or None."""
        path = self.folder / name
        try:
            return json.loads(path.read_text()) if self.resumed and path.exists() else None
        except (OSError, ValueError) as error:
            raise InputError(f"{path} is damaged ({error}): put it right, or begin in another --output_dir") from None

    def logged(self, name):
        """The lines of a log up to the step of the checkpoint. A kill may leave half a line after them, no more."""
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
                raise InputError(f"{path}:{number}: damaged: put the line right, or remove it") from None
            kept.append(line)
            self.count_skipped(row)
        return kept

    def log(self, metrics, samples):
        """A step was made."""
        self.step += 1
        for name, rows in (("metrics.jsonl", [metrics]), ("samples.jsonl", samples)):
            with self.writing(name), open(self.folder / name, "a") as file:
                file.write("".join(json.dumps({"step": self.step} | row) + "\n" for row in rows))
        self.count_skipped(metrics)

    def count_skipped(self, row):
        if "skipped_updates" in row:  # a row of metrics, not of samples
            self.skipped = self.skipped + 1 if row["skipped_updates"] else 0

    @contextmanager
    def undone_if_cut_short(self):
        """A step that ends in one of these was never begun. Nothing is updated before all its groups are judged, so
        only the randomness has to be put back; then the run is saved as it stands."""
        begun = self.generator.get_state()
        try:
            yield
        except (Stopped, InputError, torch.OutOfMemoryError):
            self.optimizer.zero_grad()
            self.generator.set_state(begun)
            self.save()
            raise

    def save(self):
        """A checkpoint of this step; the one there was becomes the one before."""
        if self.saved == self.step:
            return
        tensors = {"generator": self.generator.get_state()}
        for name, p in self.params.items():
            tensors |= {f"{name}|{key}": value.cpu() for key, value in self.optimizer.state[p].items()}
            tensors[f"{name}|value"] = p.detach().cpu()
        metadata = {"step": str(self.step), "checksum": checksum(tensors, self.step)}
        last, previous = (self.folder / name for name in CHECKPOINTS)
        with self.writing("a checkpoint"):
            for name in ("metrics.jsonl", "samples.jsonl"):  # a checkpoint may not outlive the log of its steps
                sync(self.folder / name)
        content = save(tensors, metadata)

        def write(path):
            path.write_bytes(content)
            sync(path)
            if last.exists():
                os.replace(last, previous)

        self.replace(last.name, write)
        self.saved = self.step

    def restore(self):
        """Go on from the last checkpoint that is whole."""
        paths = [self.folder / name for name in CHECKPOINTS if (self.folder / name).exists()]
        if not paths:
            return print(f"no checkpoint in {self.folder} yet: starting from the beginning")
        for path in paths:
            try:
                step, tensors = load_checkpoint(path)
                break
            except Exception as error:  # a damaged file fails in any way
                print(f"{path} is damaged ({error}): the one before it is used if there is one")
        else:
            raise InputError(f"no checkpoint in {self.folder} is whole: begin again in another --output_dir")
        if path != paths[0]:  # else the next save would keep the damaged one as the one before
            remove(paths[0])
            os.replace(path, paths[0])
        own = {f"{name}|value": p.shape for name, p in self.params.items()}
        if own != {name: t.shape for name, t in tensors.items() if name.endswith("|value")}:
            raise InputError(f"{path} is of another model or --lora_r: resume a run with its own settings")
        self.step = self.saved = step
        self.generator.set_state(tensors.pop("generator"))
        for key, tensor in tensors.items():
            name, what = key.split("|")
            p = self.params[name]
            if what == "value":
                p.data.copy_(tensor)
            else:  # AdamW wants its step count on the CPU
                self.optimizer.state[p][what] = tensor if what == "step" else tensor.to(p.device)
        print(f"resuming {self.folder} after step {self.step}")


def saved_config(path, kinds):
    """The settings of an interrupted run. Raises: InputError if they are damaged."""
    try:
        saved = json.loads(path.read_text())
        if all(type(value) is kinds[name] for name, value in saved.items()):
            return saved
    except (OSError, ValueError, KeyError, AttributeError):
        pass
    raise InputError(f"{path} is damaged: remove it, and give the run's flags again with --resume")


def how_to_go_on(folder, program="python sayo_mini.py"):
    return f"{program} --resume --output_dir {shlex.quote(str(folder))}"


def load_checkpoint(path):
    """(step, tensors) of a checkpoint. Raises: an exception of some kind if it is not whole."""
    with safe_open(path, "pt") as saved:
        step, tensors = int(saved.metadata()["step"]), {name: saved.get_tensor(name) for name in saved.keys()}
        if saved.metadata()["checksum"] != checksum(tensors, step):
            raise ValueError("its checksum differs")
    return step, tensors


def checksum(tensors, step):
    """Of all bits, with names, shapes and types; safetensors itself only checks sizes."""
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
