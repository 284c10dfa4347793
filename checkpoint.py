"""The folder of one run. Its files are complete at every moment, even if the program is killed, and
a resumed run ends in the same bits as one that was never interrupted."""

import json
import os
import shutil
import signal
import time
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from tqdm import tqdm

from commands import run_folder
from commands.checkpoint_file import load_checkpoint, pack_checkpoint
from commands.run_folder import CHECKPOINTS, remove, resume_command, sync
from commands.settings import check_checkpoint, stored_settings
from commands.signals import handle_signals, mute_lost_terminal, signals_to_stop
from config import InputError

LOGS = "metrics.jsonl", "samples.jsonl"


class Stopped(Exception):
    """Ctrl-C, SIGTERM or SIGHUP, at a point of a step where nothing has been updated yet."""


@contextmanager
def stop_signals():
    """A signal adds to the list that is yielded instead of ending the program; the loop checks it
    between groups. A second Ctrl-C ends the program at once: every file is whole at every moment.
    """
    stop = []

    def handler(number, frame):
        if stop and number == signal.SIGINT:
            raise KeyboardInterrupt
        mute_lost_terminal()
        stop.append(number)

    with handle_signals(signals_to_stop(), handler):
        yield stop


class RunDirectory:
    """config.json, logs, checkpoints, before.json, after.json, adapter/, report; and a lock.

    The state of a run is the adapter, both moments of AdamW, the random generator and the number of
    steps made, from which the learning rate and the next examples follow. During training only
    `log` and `save` write.
    """

    def __init__(self, cfg, params, optimizer, generator, scaler=None):
        self.folder, self.settings = Path(cfg.output_dir), stored_settings(cfg)
        self.params, self.optimizer, self.generator = params, optimizer, generator
        self.scaler = scaler  # a GradScaler
        self.step = 0
        self.saved_step = None  # of the newest checkpoint
        self.skipped_in_a_row = 0
        self.memory_reduced = False
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # only read if deterministic
        torch.use_deterministic_algorithms(cfg.deterministic)
        with self.writing("the run"):
            self.folder.mkdir(parents=True, exist_ok=True)
            self.lock = run_folder.lock(self.folder)
        # Those of scale_trl.py, which resumes by itself.
        trl = any(self.folder.glob("checkpoint-*/trainer_state.json"))
        ours = any((self.folder / name).exists() for name in CHECKPOINTS)
        if trl if cfg.resume else ours:
            program = "scale_trl.py" if trl else "sayo_mini.py"
            raise InputError(f"{self.folder} holds a run of {program}: choose another --output_dir")
        # Without either, nobody can tell of which settings a before.json is.
        self.resumed = cfg.resume and (ours or (self.folder / "config.json").exists())
        if cfg.resume:
            self.restore()
        texts = {name: self.logged_lines(name) for name in LOGS}
        self.write_config(cfg)
        for name, lines in texts.items():  # what was logged after the checkpoint is logged again
            text = b"".join(line + b"\n" for line in lines)
            self.atomic_write(name, lambda path, text=text: path.write_bytes(text))

    @contextmanager
    def writing(self, what):
        """Turn a failure to write, such as a full disk, into one line. The checkpoint stays."""
        try:
            yield
        except (OSError, SafetensorError) as error:
            reason = getattr(error, "strerror", None) or error
            advice = run_folder.how_to_go_on(error, self.folder)
            message = f"cannot write {what} to --output_dir {self.folder}: {reason}; {advice}"
            raise InputError(message) from None

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
        self.write_texts({name: json.dumps(content)})
        return content

    def write_texts(self, texts):
        for name, text in texts.items():
            self.atomic_write(name, lambda path, text=text: path.write_bytes(text.encode()))

    def write_config(self, cfg):
        self.settings = stored_settings(cfg)
        self.write_json("config.json", self.settings | {"made_with": run_folder.made_with()})

    def read_json(self, name, valid=lambda content: True):
        """What an interrupted run wrote under `name`, or None. Raises: InputError if it is damaged,
        or not `valid`."""
        path = self.folder / name
        try:
            if not self.resumed or not path.exists():
                return None
            content = json.loads(path.read_text(encoding="utf-8"))
            if valid(content):
                return content
            raise ValueError("its content is not what was written")
        except (OSError, ValueError) as error:
            advice = "repair it, or start in another --output_dir"
            raise InputError(f"{path} is damaged ({error}): {advice}") from None

    def logged_lines(self, name):
        """The lines of a log up to the checkpoint's step. A kill can leave half a line behind."""
        path, kept, steps = self.folder / name, [], set()
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
            steps.add(row["step"])
            self.count_skipped(row)
        if steps != set(range(1, self.step + 1)):
            advice = "restore it, or start again in another --output_dir"
            raise InputError(f"{path} lacks steps before the checkpoint, {self.step}: {advice}")
        return kept

    def log(self, metrics, samples):
        """Append one step to the logs. Raises: InputError after ten skipped updates in a row."""
        self.step += 1
        timing = {"seconds": self.seconds} | run_folder.peak_memory(self.generator.device)
        for name, rows in zip((*LOGS, "timing.jsonl"), ([metrics], samples, [timing])):
            text = "".join(json.dumps({"step": self.step} | row) + "\n" for row in rows)
            with self.writing(name), open(self.folder / name, "ab") as file:
                file.write(text.encode())
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
        """Undo a step that is interrupted, then save. If the step has updated the adapter already
        (`num_iterations` above 1), it cannot be undone: the last checkpoint stays the newest."""
        state, start = self.generator.get_state(), time.perf_counter()
        updates = self.count_updates()
        try:
            yield
            self.seconds = round(time.perf_counter() - start, 3)
        except (Stopped, InputError, torch.OutOfMemoryError):
            self.optimizer.zero_grad()
            self.generator.set_state(state)
            if self.count_updates() == updates:
                self.save()
            raise

    def count_updates(self):
        return sum(int(state.get("step", 0)) for state in self.optimizer.state.values())

    def save(self):
        """Write a checkpoint of this step, and keep the one before."""
        if self.saved_step == self.step:
            return
        tensors = {"generator": self.generator.get_state()}
        for name, p in self.params.items():
            tensors |= {f"{name}|{k}": v.cpu() for k, v in self.optimizer.state[p].items()}
            tensors[f"{name}|value"] = p.detach().cpu()
        if scale := self.scaler.state_dict():  # empty unless the model computes in fp16
            tensors["loss_scale"] = torch.tensor([scale["scale"], scale["_growth_tracker"]])
        newest, previous = (self.folder / name for name in CHECKPOINTS)
        with self.writing("a checkpoint"):
            for name in LOGS:  # a checkpoint must not outlive the log of its steps
                sync(self.folder / name)
        content = pack_checkpoint(self.step, tensors, self.settings)

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
        check_checkpoint(path, self.settings)
        shapes = {f"{name}|value": p.shape for name, p in self.params.items()}
        if shapes != {name: t.shape for name, t in tensors.items() if name.endswith("|value")}:
            advice = "resume a run with its own settings"
            raise InputError(f"{path} is from another model or --lora_r: {advice}")
        if not (self.folder / "before.json").exists():
            advice = "restore it, or start again in another --output_dir"
            raise InputError(f"{self.folder} has no before.json, but was trained: {advice}")
        self.step = self.saved_step = step
        try:
            self.generator.set_state(tensors.pop("generator"))
        except RuntimeError:  # the state of a CUDA generator is of another form
            kind = "cpu" if self.generator.device.type == "cuda" else "cuda"
            advice = f"{resume_command(self.folder)} --device {kind}"
            raise InputError(f"{path} is of a run on {kind}; continue there: {advice}") from None
        if "loss_scale" in tensors:
            scale, count = tensors.pop("loss_scale").tolist()
            changes = {"scale": scale, "_growth_tracker": int(count)}
            self.scaler.load_state_dict(self.scaler.state_dict() | changes)
        for key, tensor in tensors.items():
            name, what = key.split("|")
            p = self.params[name]
            if what == "value":
                p.data.copy_(tensor)
            else:  # AdamW wants its step count on the CPU
                self.optimizer.state[p][what] = tensor if what == "step" else tensor.to(p.device)
        if path != found[0]:  # else the next save would keep the damaged one as the previous
            remove(found[0])
            os.replace(path, found[0])
        print(f"resuming {self.folder} after step {self.step}")
