"""The folder of one run. It can be resumed after a kill at any time, bit-identically on a CPU.

Files other than logs are replaced atomically. After a kill, the logs may contain steps newer than
the checkpoint, and adapter/ may be missing. Resuming cuts the logs and writes adapter/ again."""

import json
import math
import os
import shlex
import shutil
import signal
import zlib
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from safetensors.torch import load, save

from config import FIELDS, Config, InputError, build_config, parse_reward

CHECKPOINTS = "checkpoint.safetensors", "checkpoint-previous.safetensors"  # newest first
LOGS = "metrics.jsonl", "samples.jsonl"


# --- settings of a new or resumed run ---


def run_config(given):
    """The Config of a new or resumed run, from the flags `given`. Raises: InputError if the folder
    contains other files, or if the run cannot be resumed with these flags."""
    folder = Path(given.get("output_dir", Config.output_dir))
    for name in ("dataset", "eval_dataset", "adapter", "reward", "model_name_or_path"):
        path = given.get(name)
        is_path = path not in (None, "", "scenes", "tiny")
        if name == "model_name_or_path":  # or a name on the hub
            is_path = is_path and Path(path).is_dir()
        if is_path:
            given = given | {name: os.path.abspath(path)}  # --resume may run elsewhere
    resume = given.get("resume", False)
    saved = load_settings(folder) if resume else None
    check_folder(folder, started=resume)
    if not resume:
        return build_config(given)
    for name in [name for name in given if name not in ("output_dir", "resume")]:
        old, new = saved[name], given[name]
        if name == "max_steps" and new < old:
            raise InputError(f"--max_steps {new}: the run in {folder} has {old}; it can only grow")
        fixed = name == "save_steps" and saved["keep_best"]  # it compares spans of this length
        # With --max_steps 0, before.json is about the base model, not the adapter to start from.
        fixed |= name == "max_steps" and old == 0 and saved["adapter"] != ""
        if old != new and (fixed or not FIELDS[name].metadata["may_change"]):
            advice = "leave the flag out, or start a new run in a different --output_dir"
            raise InputError(f"--{name} {new}: the run in {folder} has {old}; {advice}")
        if old != new:
            print(f"{name} {old} -> {new}")
    return build_config(given | {"output_dir": str(folder)}, saved)


def load_settings(folder):
    """The settings in a run's config.json, a dict. Raises: InputError."""
    path = Path(folder) / "config.json"
    try:
        saved = json.loads(path.read_text("utf-8"))
        return {name: saved[name] for name in FIELDS}
    except Exception as error:
        raise InputError(f"no run in {folder}: cannot read {path.name} ({error!r})") from None


def continue_exactly(cfg, data):
    """Let a resumed run use as many threads as before, because rounding depends on their number.
    Raises: InputError if it would not continue with the data and rewards it started with."""
    if not cfg.resume:
        return
    saved = json.loads((Path(cfg.output_dir) / "config.json").read_text("utf-8"))
    if saved.get("data_checksum", "") != getattr(data, "checksum", ""):
        files = " or ".join(filter(None, (cfg.dataset, cfg.eval_dataset)))
        problem = f"{files} or its images changed since the run in {cfg.output_dir} began"
        raise InputError(f"{problem}: restore them, or start again with a new --output_dir")
    before = Path(cfg.output_dir) / "before.json"
    if before.exists():  # results are compared by position
        rows = [(row["image"], row["question"]) for row in json.loads(before.read_text("utf-8"))]
        if rows != [(zlib.crc32(x.image.tobytes()), x.question) for x in data]:
            problem = f"{before} is about other questions than this run's"
            raise InputError(f"{problem}: restore it, or start again with a new --output_dir")
    if saved["reward_checksum"] != reward_checksum(cfg):
        problem = f"{parse_reward(cfg.reward)[0]} changed since the run in {cfg.output_dir} began"
        raise InputError(f"{problem}: restore it, or start again with a new --output_dir")
    torch.set_num_threads(saved["threads"])


def reward_checksum(cfg):
    """The CRC-32 of the file of --reward, or 0 without one."""
    path, _ = parse_reward(cfg.reward)
    return zlib.crc32(Path(path).read_bytes()) if path else 0


def check_folder(folder, started):
    """Raises: InputError if a run would replace files that are not its own, or write through links.

    Args: started, whether to accept a run that has steps. A run that ended before its first
    step can always be replaced.
    """
    names = set()
    for path in folder.glob("*"):
        if path.is_symlink():
            raise InputError(f"{path} is a link: replace it with the file, or choose a new folder")
        if path.name not in (*LOGS, "lock") or path.stat().st_size:
            names.add(path.name)
    config = folder / "config.json"
    ours = config.is_file() and b'"reward_weights"' in config.read_bytes()
    unstarted = {"config.json", "before.json", "traceback.txt"}
    names = {name for name in names if not name.startswith("unfinished-")}
    names -= {"probe.png", "sayo-mini"}  # the second is a tracker's
    if names and not (ours and (started or names <= unstarted)):
        what = "a run: --resume continues it, or" if ours else f"{min(names)}:"
        raise InputError(f"{folder} already contains {what} choose a new --output_dir")


def resume_command(folder):
    return f"python sayo_mini.py {shlex.join(['--resume', '--output_dir', str(folder)])}"


# --- the folder ---


class RunDirectory:
    """Locks the folder, and reads and writes its settings, logs, checkpoints and results.

    The state of a run is the adapter, both moments of AdamW, the random generator, fp16's loss
    scale, and the number of steps, which determines the learning rate and the next examples.
    """

    def __init__(self, cfg, params, optimizer, generator, scaler, data=None):
        self.folder, self.settings = Path(cfg.output_dir), asdict(cfg) | {"resume": False}
        self.params, self.optimizer, self.generator = params, optimizer, generator
        self.scaler = scaler  # a GradScaler; scale_trl.py, which saves no checkpoint, has None
        self.step, self.saved_step = 0, None  # saved_step: of the newest checkpoint
        self.logged = {name: (0, 0) for name in LOGS}  # (bytes, CRC-32) of each log
        self.folder.mkdir(parents=True, exist_ok=True)
        # One process may open the folder again, for example in a notebook.
        self.lock = FileLock(self.folder / "lock", timeout=0, is_singleton=True)
        try:
            self.lock.acquire()
        except Timeout:
            advice = "wait until it ends, or use a different --output_dir"
            raise InputError(f"another process runs in {self.folder}: {advice}") from None
        self.inode = (self.folder / "lock").stat().st_ino
        if cfg.resume:
            self.restore()
        else:  # replace a run that ended before its first step
            (self.folder / "before.json").unlink(missing_ok=True)
            for name in LOGS:
                (self.folder / name).write_bytes(b"")
        for name in LOGS:
            self.cut_log(name)
        data_checksum = getattr(data, "checksum", "")
        stored = {"data_checksum": data_checksum, "threads": torch.get_num_threads()}
        stored["reward_checksum"] = reward_checksum(cfg)
        self.write_json("config.json", self.settings | stored)
        self.tracker = None  # see `open_tracker`

    def atomic_write(self, name, write):
        """Call `write` with a temporary path, then rename that file or folder to `name`. A file is
        always the old or the new one, even after a power cut; a folder can be missing."""
        self.check_lock()
        final = self.folder / name
        unfinished = final.with_name(f"unfinished-{final.name}")
        try:
            remove(unfinished)
            write(unfinished)
            for path in [unfinished, *unfinished.rglob("*")]:
                sync(path)
            if unfinished.is_dir():  # a rename cannot replace a folder
                remove(final)
            os.replace(unfinished, final)
            sync(final.parent)
        except BaseException:
            remove(unfinished)
            raise

    def check_lock(self):
        """Raises: InputError if the lock file was removed, and another process made its own."""
        path = self.folder / "lock"
        if path.exists() and path.stat().st_ino != self.inode:
            raise InputError(f"another process continues the run in {self.folder}: this one ends")

    def write_text(self, name, text):
        self.atomic_write(name, lambda path: path.write_text(text, "utf-8", "backslashreplace"))

    def write_json(self, name, content):
        self.write_text(name, json.dumps(content))
        return content

    def read_json(self, name):
        """The JSON that an interrupted run wrote to `name`, or None if there is none."""
        path = self.folder / name
        return json.loads(path.read_text("utf-8")) if path.exists() else None

    def save_adapter(self, model, name="adapter"):
        """Write the adapter of a PEFT model to the folder `name`, in PEFT's format."""

        def write(folder):
            model.save_pretrained(folder)
            path = folder / "adapter_config.json"
            config = json.loads(path.read_text("utf-8"))
            # PEFT stores the path that the model was loaded from, a folder of this machine.
            base = self.settings["model_name_or_path"]
            config["base_model_name_or_path"] = Path(base).name if Path(base).exists() else base
            path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", "utf-8")
            (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty model card
            # safetensors lets nobody else read its files, whatever the umask.
            (folder / "adapter_model.safetensors").chmod(path.stat().st_mode)

        self.atomic_write(name, write)

    # --- logs ---

    def log(self, metrics, samples, seconds):
        """Append a step to the logs: a row of metrics, a row per completion, and the time."""
        self.check_lock()
        self.step += 1
        timing = {"seconds": round(seconds, 3)}
        if self.generator.device.type == "cuda":
            timing["peak_memory_mb"] = torch.cuda.max_memory_allocated() // 10**6
            torch.cuda.reset_peak_memory_stats()
        for name, rows in zip((*LOGS, "timing.jsonl"), ([metrics], samples, [timing])):
            lines = [json.dumps(finite({"step": self.step} | row)) + "\n" for row in rows]
            content = "".join(lines).encode()
            with open(self.folder / name, "ab") as file:
                file.write(content)
            size, crc = self.logged.get(name, (0, 0))
            self.logged[name] = size + len(content), zlib.crc32(content, crc)
        if self.tracker:
            self.tracker.log(metrics, step=self.step)

    def history(self):
        """Yield the rows of metrics.jsonl, one by one, because it can be long."""
        with open(self.folder / "metrics.jsonl", "rb") as file:
            yield from map(json.loads, file)

    def cut_log(self, name):
        """Remove what was logged after the checkpoint, because these steps run again.
        Raises: InputError if anything before it was changed."""
        path, (size, crc), found = self.folder / name, self.logged[name], 0
        if not path.exists():
            raise InputError(f"{path} is missing: restore it, or start with a new --output_dir")
        with open(path, "r+b") as file:
            while part := file.read(min(2**20, size - file.tell())):
                found = zlib.crc32(part, found)
            if file.tell() < size or found != crc:
                problem = f"{path} changed, or lacks steps up to the checkpoint, {self.step}"
                raise InputError(f"{problem}: restore it, or start again with a new --output_dir")
            file.truncate(size)

    # --- checkpoints ---

    def save(self):
        """Write a checkpoint of this step, after renaming the last one to the previous one. After a
        kill in between, there is only the previous one."""
        if self.saved_step == self.step:
            return
        tensors = {"generator": self.generator.get_state()}
        for name, p in self.params.items():
            tensors |= {f"{name}|{k}": v.cpu() for k, v in self.optimizer.state[p].items()}
            tensors[f"{name}|value"] = p.detach().cpu()
        logged = {name: self.logged[name] for name in LOGS}
        state = {"step": self.step, "scaler": self.scaler.state_dict(), "logged": logged}
        tensors["state"] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
        tensors["checksum"] = checksum(tensors)
        newest, previous = (self.folder / name for name in CHECKPOINTS)

        def write(path):
            path.write_bytes(save(tensors))
            sync(path)
            if newest.exists():
                os.replace(newest, previous)

        for name in LOGS:  # logs must reach the disk before the checkpoint
            sync(self.folder / name)
        self.atomic_write(newest.name, write)
        self.saved_step = self.step

    def restore(self):
        """Continue from the newest intact checkpoint."""
        if any(self.folder.glob("checkpoint-*/trainer_state.json")):
            raise InputError(f"{self.folder} has a run of extras/scale_trl.py: resume it there")
        found = [self.folder / name for name in CHECKPOINTS if (self.folder / name).exists()]
        if not found:
            return print(f"no checkpoint in {self.folder} yet: starting from the beginning")
        advice = "start again with a new --output_dir"
        if not (self.folder / "before.json").exists():
            raise InputError(f"{self.folder} has a checkpoint but no before.json: {advice}")
        for path in found:
            try:
                state, tensors = load_checkpoint(path)
                break
            except Exception as error:  # a damaged file can raise anything
                print(f"{path} is damaged ({error}): trying the previous checkpoint")
        else:
            raise InputError(f"no checkpoint in {self.folder} is intact: {advice}")
        if path != found[0]:  # or the next save would keep the damaged file
            os.replace(path, found[0])
        self.step = self.saved_step = state["step"]
        self.logged = state["logged"]
        try:
            self.generator.set_state(tensors["generator"])
        except RuntimeError:  # CPU and CUDA generators have different states
            raise InputError(f"{path} is from another kind of --device: {advice}") from None
        if state["scaler"]:  # empty unless the model computes in fp16
            self.scaler.load_state_dict(state["scaler"])
        for name, p in self.params.items():
            p.data.copy_(tensors[f"{name}|value"])
            for key in ("step", "exp_avg", "exp_avg_sq"):  # of AdamW, after the first update
                if (value := tensors.get(f"{name}|{key}")) is not None:
                    # AdamW keeps its step count on the CPU.
                    self.optimizer.state[p][key] = value if key == "step" else value.to(p.device)
        print(f"resuming {self.folder} after step {self.step}")


def load_checkpoint(path):
    """(state, tensors) of a checkpoint. Raises an exception of any type if the file is damaged."""
    tensors = load(path.read_bytes())
    if tensors.pop("checksum") != checksum(tensors):
        raise ValueError("its checksum differs")
    return json.loads(bytes(tensors.pop("state").tolist())), tensors


def checksum(tensors):
    """CRC-32 of all data, names, shapes and types. safetensors itself only checks sizes."""
    total = 0
    for name, tensor in sorted(tensors.items()):
        total = zlib.crc32(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode(), total)
        total = zlib.crc32(tensor.contiguous().reshape(-1).view(torch.uint8).numpy(), total)
    return torch.tensor(total)


def open_tracker(name, run):
    """An Accelerator that logs a run to TensorBoard, W&B or trackio, or None for "none".
    Raises: InputError if the tracker is not installed."""
    if name == "none":
        return None
    from accelerate import Accelerator  # here, because most runs do without
    from accelerate.tracking import get_available_trackers

    if name not in map(str, get_available_trackers()):
        raise InputError(f"--report_to {name} is not installed: pip install {name}")
    tracker = Accelerator(log_with=name, project_dir=run.folder)
    tracker.init_trackers("sayo-mini", run.settings)
    return tracker


def finite(row):
    """The row with NaN and infinity replaced by None, because JSON has neither. They occur in steps
    whose update was skipped."""
    bad = {name for name, x in row.items() if isinstance(x, float) and not math.isfinite(x)}
    return row | dict.fromkeys(bad)


def sync(path):
    """Flush a file or folder to disk (fsync). Windows cannot sync folders or files that are opened
    read-only."""
    if path.is_dir() and os.name == "nt":
        return
    file = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def remove(path):
    """Delete a file or folder, if it exists."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


# --- signals ---


@contextmanager
def stop_signals():
    """Append Ctrl-C, SIGTERM and SIGHUP to the yielded list, which training checks between steps.
    A second Ctrl-C ends the program at once; the step in flight is lost."""
    stop = []

    def handler(number, frame):
        if stop and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop.append(number)

    numbers = [signal.SIGINT, signal.SIGTERM]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        numbers.append(signal.SIGHUP)  # nohup ignores it
    previous = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield stop
    finally:
        for number, old in previous.items():
            signal.signal(number, old)
