"""The folder of one run. It can be resumed after a kill at any time, bit-identically on a CPU.

Files other than logs are replaced atomically. A kill can leave metrics.jsonl and samples.jsonl
ahead of the checkpoint, or no adapter/. Resuming cuts both logs back and writes adapter/ again."""

import json
import os
import shutil
import time
from contextlib import contextmanager
from itertools import takewhile
from pathlib import Path
from statistics import fmean

import torch
from safetensors import SafetensorError
from tqdm import tqdm

from config import InputError
from runtime import run_folder
from runtime.checkpoint_file import load_checkpoint, pack_checkpoint
from runtime.run_folder import CHECKPOINTS, remove, resume_command, sync
from runtime.settings import check_checkpoint, stored_settings
from runtime.signals import Stopped

LOGS = "metrics.jsonl", "samples.jsonl"


class RunDirectory:
    """Locks the folder, and reads and writes its settings, logs, checkpoints and results.

    The state of a run is the adapter, both moments of AdamW, the random generator, fp16's loss
    scale, and the number of steps, which determines the learning rate and the next examples.
    """

    def __init__(self, cfg, params, optimizer, generator, scaler=None):
        self.folder, self.settings = Path(cfg.output_dir), stored_settings(cfg)
        self.params, self.optimizer, self.generator = params, optimizer, generator
        self.scaler = scaler  # a GradScaler
        self.step = 0
        self.saved_step = None  # step of the newest checkpoint
        self.history = []  # the rows of metrics.jsonl
        self.best = None  # (share of right samples, step, {name: weights}), for --keep_best
        self.memory_reduced = False
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # only read if deterministic
        torch.use_deterministic_algorithms(cfg.deterministic)
        with self.writing("the run"):
            self.folder.mkdir(parents=True, exist_ok=True)
            self.lock = run_folder.lock(self.folder)
        # Checkpoints of scale_trl.py, which TRL resumes.
        trl = any(self.folder.glob("checkpoint-*/trainer_state.json"))
        ours = any((self.folder / name).exists() for name in CHECKPOINTS)
        if trl if cfg.resume else ours:
            program = "scale_trl.py" if trl else "sayo_mini.py"
            raise InputError(f"{self.folder} contains a run of {program}: use a new --output_dir")
        # Otherwise the settings behind a before.json are unknown.
        self.resumed = cfg.resume and (ours or (self.folder / "config.json").exists())
        if cfg.resume:
            self.restore()
        texts = {name: self.logged_lines(name) for name in LOGS}
        self.write_config(cfg)
        for name, lines in texts.items():  # steps after the checkpoint run again
            text = b"".join(line + b"\n" for line in lines)
            self.atomic_write(name, lambda path, text=text: path.write_bytes(text))

    @contextmanager
    def writing(self, what):
        """Turn a failure to write, such as a full disk, into a one-line InputError."""
        try:
            yield
        except (OSError, SafetensorError) as error:
            reason = getattr(error, "strerror", None) or error
            advice = run_folder.write_error_advice(error, self.folder)
            message = f"cannot write {what} to --output_dir {self.folder}: {reason}; {advice}"
            raise InputError(message) from None

    def atomic_write(self, name, write):
        """Call `write` with a temporary path, then rename that file or folder to `name`, which may
        be in a subfolder. A file is always the old or the new one, even after a power cut; a folder
        can be missing."""
        final = self.folder / name
        unfinished = final.with_name(f"unfinished-{final.name}")
        with self.writing(name):
            try:
                remove(unfinished)
                write(unfinished)
                for path in [unfinished, *unfinished.rglob("*")]:
                    sync(path)
                if final.is_dir():  # a rename cannot replace it
                    shutil.rmtree(final)
                os.replace(unfinished, final)
                sync(final.parent)
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
        """The JSON that an interrupted run wrote to `name`, or None. Raises: InputError if it is
        damaged or not `valid`."""
        path = self.folder / name
        try:
            if not self.resumed or not path.exists():
                return None
            content = json.loads(path.read_text(encoding="utf-8"))
            if valid(content):
                return content
            raise ValueError("unexpected content")
        except (OSError, ValueError) as error:
            advice = "repair it, or start again with a new --output_dir"
            raise InputError(f"{path} is damaged ({error}): {advice}") from None

    def logged_lines(self, name):
        """The lines of a log up to the checkpoint's step. A kill can cut the last line."""
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
            self.history += [row] if name == "metrics.jsonl" else []
        if steps != set(range(1, self.step + 1)):
            advice = "restore it, or start again with a new --output_dir"
            raise InputError(f"{path} lacks steps up to the checkpoint, {self.step}: {advice}")
        return kept

    def log(self, metrics, samples):
        """Append a step. Raises: InputError if the last ten updates, or all, were skipped."""
        self.step += 1
        timing = {"seconds": self.seconds} | run_folder.peak_memory(self.generator.device)
        for name, rows in zip((*LOGS, "timing.jsonl"), ([metrics], samples, [timing])):
            text = "".join(json.dumps({"step": self.step} | row) + "\n" for row in rows)
            with self.writing(name), open(self.folder / name, "ab") as file:
                file.write(text.encode())
        self.history.append({"step": self.step} | metrics)
        every, last = self.settings["save_steps"], self.settings["max_steps"]
        if self.settings["keep_best"] and (self.step % every == 0 or self.step == last):
            self.update_best(self.history[-every:])
        updates = reversed(self.history)
        skipped = sum(1 for _ in takewhile(lambda row: row.get("skipped_updates"), updates))
        if skipped:
            reason = f"non-finite loss or gradient ({skipped} in a row)"
            tqdm.write(f"step {self.step}: skipped update: {reason}")
        if skipped >= min(10, self.settings["max_steps"]):
            self.save()
            advice = "lower --learning_rate or try --no-load_in_4bit, with a new --output_dir"
            raise InputError(f"stopped after step {self.step}: {reason}; {advice}")

    def update_best(self, rows):
        """Remember the adapter if the samples of these last steps were right more often than those
        of any earlier ones."""
        score = fmean(row["rewards/accuracy/mean"] for row in rows)
        if self.best is None or score > self.best[0]:
            weights = {name: p.detach().cpu().clone() for name, p in self.params.items()}
            self.best = score, self.step, weights

    def use_best(self):
        """With --keep_best, put the best adapter back into the model, once training has ended."""
        if self.best:
            score, step, weights = self.best
            for name, p in self.params.items():
                p.data.copy_(weights[name])
            print(f"kept the adapter of step {step}: {score:.0%} of its recent samples were right")

    @contextmanager
    def roll_back_on_interrupt(self):
        """Undo an interrupted step, then save. If the step has already updated the adapter
        (possible if `num_iterations` is above 1), it cannot be undone and nothing is saved."""
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
        """Write a checkpoint of this step, keeping the previous one."""
        if self.saved_step == self.step:
            return
        tensors = {"generator": self.generator.get_state()}
        for name, p in self.params.items():
            tensors |= {f"{name}|{k}": v.cpu() for k, v in self.optimizer.state[p].items()}
            tensors[f"{name}|value"] = p.detach().cpu()
        if self.best:
            score, step, weights = self.best
            tensors["best"] = torch.tensor([score, step], dtype=torch.float64)
            tensors |= {f"{name}|best": weight for name, weight in weights.items()}
        if scale := self.scaler.state_dict():  # empty unless the model computes in fp16
            tensors["loss_scale"] = torch.tensor([scale["scale"], scale["_growth_tracker"]])
        newest, previous = (self.folder / name for name in CHECKPOINTS)
        with self.writing("a checkpoint"):
            for name in LOGS:  # logs must reach the disk before the checkpoint
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
        """Continue from the newest intact checkpoint."""
        found = [self.folder / name for name in CHECKPOINTS if (self.folder / name).exists()]
        if not found:
            return print(f"no checkpoint in {self.folder} yet: starting from the beginning")
        for path in found:
            try:
                step, tensors = load_checkpoint(path)
                break
            except Exception as error:  # a damaged file can raise anything
                print(f"{path} is damaged ({error}): trying the previous checkpoint")
        else:
            advice = "start again with a new --output_dir"
            raise InputError(f"no checkpoint in {self.folder} is intact: {advice}")
        check_checkpoint(path, self.settings)
        shapes = {f"{name}|value": p.shape for name, p in self.params.items()}
        if shapes != {name: t.shape for name, t in tensors.items() if name.endswith("|value")}:
            advice = "use that run's settings"
            raise InputError(f"{path} was made with a different model or --lora_r: {advice}")
        if not (self.folder / "before.json").exists():
            advice = "restore it, or start again with a new --output_dir"
            raise InputError(f"{self.folder} has a checkpoint but no before.json: {advice}")
        self.step = self.saved_step = step
        try:
            self.generator.set_state(tensors.pop("generator"))
        except RuntimeError:  # CPU and CUDA generators have different states
            kind = "cpu" if self.generator.device.type == "cuda" else "cuda"
            advice = f"{resume_command(self.folder)} --device {kind}"
            raise InputError(f"{path} was made on {kind}: continue there with {advice}") from None
        if "loss_scale" in tensors:
            scale, count = tensors.pop("loss_scale").tolist()
            changes = {"scale": scale, "_growth_tracker": int(count)}
            self.scaler.load_state_dict(self.scaler.state_dict() | changes)
        if "best" in tensors:
            score, step = tensors.pop("best").tolist()
            weights = {name: tensors.pop(f"{name}|best") for name in self.params}
            self.best = score, int(step), weights
        for key, tensor in tensors.items():
            name, what = key.split("|")
            p = self.params[name]
            if what == "value":
                p.data.copy_(tensor)
            else:  # AdamW keeps its step count on the CPU
                self.optimizer.state[p][what] = tensor if what == "step" else tensor.to(p.device)
        if path != found[0]:  # or the next save would keep the damaged file
            remove(found[0])
            os.replace(path, found[0])
        print(f"resuming {self.folder} after step {self.step}")
