"""Run one part of `bench/gpu.sh` and record the result, even if it fails.

    python bench/record.py FOLDER NAME COMMAND ...

The output of the command goes to the terminal and to FOLDER/NAME.log. FOLDER/NAME.json contains the
command, its exit code and duration, the end of its output, the machine and the versions.
"""

import json
import os
import platform
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).parent.parent
KEPT = 4000  # characters of the output
PACKAGES = ("torch", "transformers", "bitsandbytes", "peft", "trl")


def run_logged(command, log):
    """Run a command. Its output goes to the file `log` and the terminal. Returns: the exit code."""
    with open(log, "wb") as file:
        try:
            process = subprocess.Popen(
                command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
            )
        except OSError as error:
            file.write(str(error).encode())
            return 127
        for line in process.stdout:
            file.write(line)
            sys.stdout.buffer.write(line)
            sys.stdout.flush()
        return process.wait()


def describe_machine():
    """The machine and the versions. This does not import torch, because a process that has loaded
    it takes memory of the card. The version of torch names its CUDA, as in 2.13.0+cu130."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    query = "--query-gpu=name,compute_cap,memory.total,driver_version", "--format=csv,noheader"
    return {
        "processor": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "card": output("nvidia-smi", *query),
        "system": platform.platform(),
        "python": platform.python_version(),
        **{name: installed(name) for name in PACKAGES},
        "commit": output("git", "rev-parse", "HEAD"),
    }


def installed(package):
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def output(*command):
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    except OSError:
        return None


def main():
    folder, name, command = Path(sys.argv[1]).resolve(), sys.argv[2], sys.argv[3:]
    folder.mkdir(parents=True, exist_ok=True)
    log, start = folder / f"{name}.log", time.time()
    code = run_logged(command, log)
    result = {
        "part": name,
        "command": " ".join(command),
        "exit_code": code,
        "seconds": round(time.time() - start, 1),
        "output": log.read_text("utf-8", errors="replace")[-KEPT:],
        "machine": describe_machine(),
    }
    (folder / f"{name}.json").write_text(json.dumps(result, indent=1))
    print(f"{name}: {'done' if code == 0 else f'FAILED ({code})'} in {result['seconds']} s")
    return code


if __name__ == "__main__":
    sys.exit(main())
