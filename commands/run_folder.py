"""The folder of a run as files: who uses it, what it holds, and writing that survives a power cut.
Only the standard library is imported here."""

import errno
import json
import os
import shlex
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from platform import python_version

from config import ROOT, InputError

try:
    import fcntl
    import resource
except ImportError:  # Windows
    fcntl = resource = None

CHECKPOINTS = "checkpoint.safetensors", "checkpoint-previous.safetensors"  # newest first
LIBRARIES = "torch", "transformers", "peft", "bitsandbytes"
WINDOWS = os.name == "nt"


# --- what a folder holds ---


def holds_run(folder):
    """Whether anything in this folder would be lost if another run began there: a logged step, a
    checkpoint (also of scale_trl.py), or results. A run that ended before its first step holds
    nothing."""
    logged = folder / "metrics.jsonl"
    if logged.exists() and logged.stat().st_size:
        return True
    names = [*CHECKPOINTS, "adapter", "after.json"]
    return any((folder / name).exists() for name in names) or any(folder.glob("checkpoint-*/*"))


def checkpoint_settings(path):
    """The settings that a checkpoint holds, as a dict: {} if it is damaged, or of an earlier
    version. The file is a length of 8 bytes, a header in JSON, and the tensors."""
    try:
        with open(path, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size)) if size < 2**30 else {}
        settings = json.loads(header["__metadata__"]["settings"])
    except (OSError, ValueError, KeyError, TypeError, MemoryError):
        return {}
    return settings if isinstance(settings, dict) else {}


def resume_command(folder, program="python sayo_mini.py"):
    return f"{program} {join_flags(['--resume', '--output_dir', str(folder)])}"


def join_flags(flags):
    """Flags as one line that a shell reads back."""
    return subprocess.list2cmdline(flags) if WINDOWS else shlex.join(flags)


def made_with():
    """The versions and the git commit of this program, for config.json."""
    found = {"python": python_version()}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found | {"commit": git_commit()}


def git_commit():
    """The commit of this checkout, "-dirty" if files were changed since; None without git."""
    if not (ROOT / ".git").exists():
        return None
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        done = subprocess.run([*command, "--exclude=*"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def peak_memory(device):
    """{"peak_memory_mb": of the GPU since the last call, or of this process since it started}; None
    on Windows."""
    if device.type == "cuda":
        import torch

        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
    elif resource:
        unit = 1 if sys.platform == "darwin" else 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    else:
        peak = None
    return {"peak_memory_mb": peak and peak // 10**6}


# --- who uses it ---


def lock(folder):
    """Lock the folder of a run for this process. Returns: the open file, whose lock is gone when it
    is closed or the process ends, however that happens. Raises: InputError if another process has
    it; OSError if the file cannot be written."""
    file = open(folder / "lock", "a", encoding="utf-8")
    try:
        if fcntl:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            import msvcrt

            file.seek(0)
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN, errno.EDEADLK):
            file.close()
            advice = "wait until it ends, or choose another --output_dir"
            raise InputError(f"another process is running in {folder}: {advice}") from None
        # This file system has no locks.
    return file


def check_folder(folder):
    """Before anything slow: could a run write here, and is no other process at it?
    Raises: InputError."""
    try:
        if (folder / "lock").exists():
            lock(folder).close()
        existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        problem = None if existing.is_dir() else f"{existing} is not a folder"
        if not problem and not os.access(existing, os.W_OK | os.X_OK):
            problem = f"{existing} is not writable"
    except OSError as error:
        problem = error.strerror
    if problem:
        raise InputError(f"--output_dir {folder}: {problem}; choose another")


# --- writing ---


def how_to_go_on(error, folder):
    """What to do about a failure to write, which is an OSError or of safetensors."""
    if not os.path.exists(folder / "config.json"):
        return "choose another --output_dir"
    forbidden = getattr(error, "errno", None) in (errno.EACCES, errno.EPERM, errno.EROFS)
    repair = "make it writable" if forbidden else "make room"
    return f"what was saved is intact: {repair}, then {resume_command(folder)}"


def sync(path):
    """Wait until the disk has it. Windows can sync neither folders nor files that are open for
    reading only."""
    if path.is_dir() and WINDOWS:
        return
    file = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def remove(path):
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
