"""The folder of a run: content, lock, and writes that survive a power cut. Imports only the
standard library."""

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


# --- content ---


def holds_run(folder):
    """Whether a new run in this folder would overwrite a logged step, a checkpoint (including those
    of scale_trl.py) or results. A run that ended before its first step has none of these."""
    logged = folder / "metrics.jsonl"
    if logged.exists() and logged.stat().st_size:
        return True
    names = [*CHECKPOINTS, "adapter", "after.json"]
    return any((folder / name).exists() for name in names) or any(folder.glob("checkpoint-*/*"))


def checkpoint_settings(path):
    """The settings in a checkpoint, a dict. It is empty if the file is damaged or from an earlier
    version. The file consists of an 8-byte length, a JSON header of that length, and tensors."""
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
    """Flags as a line of text, quoted for the shell."""
    return subprocess.list2cmdline(flags) if WINDOWS else shlex.join(flags)


def made_with():
    """The library versions and git commit of this program, for config.json."""
    found = {"python": python_version()}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found | {"commit": git_commit()}


def git_commit():
    """The commit of this checkout, with "-dirty" if files changed since; None without git."""
    if not (ROOT / ".git").exists():
        return None
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        done = subprocess.run([*command, "--exclude=*"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def peak_memory(device):
    """{"peak_memory_mb": MB}: of the GPU since the last call, or of this process since its start.
    The value is None on Windows without a GPU."""
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


# --- lock ---


def lock(folder):
    """Lock the folder of a run for this process. Returns: the open lock file. The lock is released
    when the file is closed or the process ends. Raises: InputError if another process has the lock;
    OSError if the file cannot be written."""
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
            advice = "wait until it ends, or use a different --output_dir"
            raise InputError(f"another process is running in {folder}: {advice}") from None
        # This file system does not support locks.
    return file


def check_folder(folder):
    """Check early that a run can write to the folder and that no other process uses it.
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
        raise InputError(f"--output_dir {folder}: {problem}; use a different folder")


# --- writing ---


def write_error_advice(error, folder):
    """Advice for a failure to write. Args: error, an OSError or a SafetensorError."""
    if not os.path.exists(folder / "config.json"):
        return "use a different --output_dir"
    forbidden = getattr(error, "errno", None) in (errno.EACCES, errno.EPERM, errno.EROFS)
    repair = "make the folder writable" if forbidden else "free space"
    return f"saved files are intact: {repair}, then run: {resume_command(folder)}"


def sync(path):
    """Flush a file or folder to disk (fsync). Windows cannot sync folders or files that are opened
    read-only."""
    if path.is_dir() and WINDOWS:
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
