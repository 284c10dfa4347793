"""What is worth knowing from one short call on a GPU, most valuable first.

    python study/gpu.py OUT 520           # a folder, and the seconds it may take in all
    python study/gpu.py OUT 900 --small   # a check of this script on a CPU

Every part of `gpu_parts.py` runs in its own process with its own limit. OUT/gpu.json is rewritten
after each, so a kill loses only the part in flight. OUT/gpu.log has all output.
"""

import json
import subprocess
import sys
import time
from pathlib import Path

SCRIPT = Path(__file__).with_name("gpu_parts.py")
PARTS = {  # name -> most seconds, in the order of their value
    "card": 60,  # versions, ceilings, which kernels attention and 4-bit products get
    "tests": 100,  # tests/test_cuda.py
    "decode": 110,  # seconds per token: eager, graph, dequantized once; are the tokens equal?
    "step": 110,  # seconds and memory of real steps, lengths fixed and new
    "tiny": 100,  # the whole quick start: does it learn?
    "trl": 150,  # ours and TRL at two points
}


def run_part(name, limit, flags, log):
    """Returns: the last line of JSON that a part printed, its exit code and its seconds."""
    command = ["timeout", "-k", "3", str(int(limit)), sys.executable, SCRIPT, name, *flags]
    start = time.time()
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    done = subprocess.run(command, **pipes, text=True, errors="replace")
    log.write(f"\n== {name}: exit {done.returncode}\n{done.stdout}")
    log.flush()
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    found = json.loads(lines[-1]) if lines else {}
    if done.returncode:
        found["failed"] = done.stdout[-1000:]
    return found | {"exit": done.returncode, "s": round(time.time() - start, 1)}


def main():
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    out, end, flags = Path(sys.argv[1]), time.time() + float(sys.argv[2]), sys.argv[3:]
    out.mkdir(parents=True, exist_ok=True)
    results = {}
    with open(out / "gpu.log", "w") as log:
        for name in [flag for flag in flags if flag in PARTS] or PARTS:
            limit = min(PARTS[name] * (10 if "--small" in flags else 1), end - time.time() - 5)
            results[name] = {"exit": "no time left"}
            if limit > 20:
                results[name] = run_part(name, limit, flags, log)
            (out / "gpu.unfinished").write_text(json.dumps(results, indent=1))
            (out / "gpu.unfinished").replace(out / "gpu.json")
    for name, found in results.items():
        print(f"\n{name}")
        for key, value in found.items():
            print(f"  {key:44} {str(value)[-600:]}")
    sys.exit(any(found["exit"] for found in results.values()))


if __name__ == "__main__":
    main()
