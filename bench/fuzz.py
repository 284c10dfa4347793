"""Run the program on damaged inputs. No input may cause a traceback or a broken run.

    python bench/fuzz.py                       # 320 mutations, 40 of each kind
    python bench/fuzz.py --only adapter:7      # repeat one, and keep its files

Each mutation changes one valid input (the flags, a .jsonl file, an image, an adapter, the folder of
a model, or the config.json, checkpoint, logs or evaluations of a run). The program then runs on it
in its own process and folder. The processes are forks of one that has imported everything. A
mutation passes if
- the exit code is 0, or 2 for an error in the input;
- stderr has at most one line apart from progress bars, and exactly one if the exit code is 2
  (`check` lists the problems on stdout instead);
- there is no traceback, and the process is not ended by a signal or by the limit of one minute;
- the JSON, logs and checkpoints of the run can be read afterwards, except for files that the
  mutation damaged, and no unfinished file is left.
Writes bench/results/fuzz.json.
"""

import argparse
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from dataclasses import fields
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

import torch
from safetensors.torch import load_file, save_file

import sayo_mini
from analysis.html_report import render_report  # noqa: F401, imported before the forks
from bench.doc_tables import RESULTS, ROOT, machine, write_atomically
from checkpoint import CHECKPOINTS, load_checkpoint
from commands import check, look, probe  # noqa: F401
from config import Config
from sources import jsonl  # noqa: F401
from sources.scenes import Scenes

SECONDS, MEMORY = 60, 8 * 2**30  # limits per process
KINDS = "flags", "jsonl", "image", "config", "checkpoint", "log", "adapter", "model"
FAST = "--device cpu --no-load_in_4bit --prompts_per_step 1 --num_generations 2".split()
FAST += "--eval_examples 2 --max_steps 1 --save_steps 1 --max_completion_length 16".split()
# Large values of these flags are valid but slow, so they are not tried.
SIZES = "max_steps num_generations prompts_per_step eval_examples max_completion_length".split()
SIZES += "num_iterations lora_r max_pixels".split()
QUESTION = "What color is the dot on the pink card?"
TEXTS = ["", " ", "é漢字🙂", "\u202e", "\x00", "a" * 5000, "../..", "/dev/null", "NaN", "-1", "1e9"]
NUMBERS = [-1, 0, 1, 0.5, -0.0, 1e-300, 1e308, 10**40, math.nan, math.inf, -math.inf]
VALUES = [None, True, False, [], {}, [[]], [1, 2], {"a": 1}, "\ud800", *TEXTS, *NUMBERS]


# --- the valid inputs ---


def make_inputs(folder):
    """Create a data set, an unfinished run and a model in `folder`."""
    data = folder / "data"
    data.mkdir()
    rows = []
    for i, suffix in enumerate(("png", "jpg", "gif", "webp", "png", "tiff")):
        scene = Scenes("validation", 6)[i]
        scene.image.save(data / f"{i}.{suffix}")
        row = {"image": f"{i}.{suffix}", "question": scene.question, "answer": scene.answer}
        rows.append(row | {"boxes": [list(box) for box in scene.boxes], "id": f"id{i}"})
    (data / "set.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = [*FAST, "--max_steps", "2", "--output_dir", str(folder / "run")]
    code, _, err = in_fork(folder, flags)
    if code:
        raise SystemExit(f"the valid run ended with exit code {code}: {err}")
    (folder / "run" / CHECKPOINTS[0]).unlink()  # so that resuming continues after step 1
    shutil.copytree(ROOT / "tiny", folder / "model", ignore=lambda *_: {"make.py", "__pycache__"})


# --- mutations ---


def mutate_bytes(rng, content):
    """Returns: (the changed bytes, what was done)."""
    content, n = bytearray(content), len(content)
    at, size = rng.randrange(n), rng.randint(1, 64)
    kind = rng.choice("flip truncate zero insert remove repeat garbage empty".split())
    if kind == "flip":
        for _ in range(rng.randint(1, 8)):
            content[rng.randrange(n)] ^= 1 << rng.randrange(8)
    elif kind == "truncate":
        content = content[:at]
    elif kind == "zero":
        content[at : at + size] = bytes(len(content[at : at + size]))
    elif kind == "insert":
        content[at:at] = rng.randbytes(size)
    elif kind == "remove":
        del content[at : at + size]
    elif kind == "repeat":
        content[at:at] = content[at : at + size]
    elif kind == "garbage":
        content = rng.randbytes(n)
    else:
        content = b""
    return bytes(content), f"{kind} at byte {at} of {n}"


def mutate_json(rng, value):
    """Replace or remove a random value in decoded JSON. Returns: what was done."""
    path = []
    while True:
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        key = rng.choice(keys)
        path.append(str(key))
        inner = value[key]
        if not isinstance(inner, (dict, list)) or not inner or rng.random() < 0.3:
            break
        value = inner
    if rng.random() < 0.2:
        del value[key]
        return f"{'/'.join(path)} removed"
    chosen = VALUES if key not in SIZES else [v for v in VALUES if v not in (10**40, 1e308)]
    value[key] = rng.choice(chosen)
    return f"{'/'.join(path)} = {value[key]!r:.60}"


def mutate_tensors(rng, path):
    """Change one tensor of a safetensors file. Returns: what was done."""
    tensors = load_file(path)
    name = rng.choice(sorted(tensors))
    kind = rng.choice("NaN inf huge removed renamed flat half integer empty".split())
    tensor = tensors[name].clone()
    if kind in ("NaN", "inf", "huge"):
        tensor = tensor.float()
        tensor.view(-1)[rng.randrange(tensor.numel())] = dict(
            NaN=math.nan, inf=math.inf, huge=3e38
        )[kind]
    changes = {"flat": tensor.reshape(-1), "half": tensor.half(), "integer": tensor.to(torch.int32)}
    changes |= {"empty": tensor[:0], "renamed": tensor}
    del tensors[name]
    if kind != "removed":
        name = name + "x" if kind == "renamed" else name
        tensors[name] = changes.get(kind, tensor).contiguous()
    save_file(tensors, path)
    return f"{name}: {kind}"


def mutate_file(rng, path):
    """Damage a file in a way that suits its type. Returns: what was done."""
    if path.suffix == ".safetensors" and "checkpoint" not in path.name and rng.random() < 0.6:
        return mutate_tensors(rng, path)
    if path.suffix in (".json", ".jsonl") and rng.random() < 0.6:
        lines = path.suffix == ".jsonl"
        text = path.read_text()
        rows = [json.loads(line) for line in text.splitlines()] if lines else [json.loads(text)]
        row = rng.randrange(len(rows))
        done = mutate_json(rng, rows[row] if isinstance(rows[row], dict) else rows)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return f"row {row}: {done}"
    if rng.random() < 0.1:
        path.unlink()
        return "removed"
    content, done = mutate_bytes(rng, path.read_bytes())
    path.write_bytes(content)
    return done


def mutate_flags(rng, flags):
    """Returns: (changed flags, what was done)."""
    names = [f.name for f in fields(Config)] + ["box", "image", "question", "output", "max_step"]
    kind = rng.choice(["value"] * 6 + ["drop", "repeat", "shuffle", "unicode"])
    flags = list(flags)
    at = rng.randrange(len(flags))
    if kind == "value":
        name = rng.choice(names)
        value = str(rng.choice(TEXTS[:-1] + NUMBERS if name not in SIZES else ["x", "-1", "0.5"]))
        return [*flags, f"--{name}={value}"], f"--{name}={value!r:.60}"
    if kind == "drop":
        return flags[:at] + flags[at + 1 :], f"without {flags[at]!r}"
    if kind == "repeat":
        return flags[:at] + flags[at : at + 1] + flags[at:], f"{flags[at]!r} twice"
    if kind == "shuffle":
        shuffled = rng.sample(flags, len(flags))
        return shuffled, "in a different order"
    return [*flags[:at], rng.choice(TEXTS), *flags[at + 1 :]], f"{flags[at]!r} replaced"


def make_case(kind, rng, inputs, folder):
    """Copy the inputs into `folder` and change one. Returns: (argv, what was done)."""
    for name in {"config": ["run"], "checkpoint": ["run"], "log": ["run"]}.get(kind, ["data"]):
        shutil.copytree(inputs / name, folder / name)
    train = ["--dataset", "data/set.jsonl", *FAST, "--output_dir", "run"]
    asked = ["look", "--image", "data/0.png", "--question", QUESTION, *FAST]
    asked += ["--output", "look.png", "--box", "19,37,37,55"]
    checked = ["check", "data/set.jsonl"]
    if kind == "flags":
        return mutate_flags(rng, rng.choice((train, asked, checked, ["probe", *train])))
    if kind in ("jsonl", "image"):
        path = folder / "data" / "set.jsonl"
        if kind == "image":
            path = folder / "data" / rng.choice(("0.png", "1.jpg", "2.gif", "3.webp", "5.tiff"))
        done = f"{path.name}: {mutate_file(rng, path)}"
        if kind == "image" and rng.random() < 0.4:
            return ["look", "--image", f"data/{path.name}", *asked[3:]], done
        skip = rng.choice(([], ["--skip_bad_examples"]))
        return rng.choice((checked, [*train, *skip])), done
    if kind in ("config", "checkpoint", "log"):
        names = {"config": ["config.json"], "checkpoint": [CHECKPOINTS[1]]}
        logs = ["metrics.jsonl", "samples.jsonl", "before.json", "after.json"]
        name = rng.choice(names.get(kind, logs))
        resumed = ["--resume", "--output_dir", "run"]
        return resumed, f"{name}: {mutate_file(rng, folder / 'run' / name)}"
    part = "adapter" if kind == "adapter" else "model"
    shutil.copytree(inputs / ("run/adapter" if kind == "adapter" else "model"), folder / part)
    path = rng.choice(sorted(p for p in (folder / part).iterdir() if p.suffix != ".md"))
    flags = ["--adapter", "adapter"] if kind == "adapter" else ["--model_name_or_path", "model"]
    command = rng.choice((train, asked, ["probe", *train]))
    return [*command, *flags], f"{path.name}: {mutate_file(rng, path)}"


# --- running and judging ---


def start(folder, argv):
    """Run the program in a fork, in `folder`. Returns: its process id."""
    pid = os.fork()
    if pid:
        return pid
    try:
        os.chdir(folder)
        for number, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT), number)
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # pytest has replaced them
        sys.stderr = open(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False)
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        signal.alarm(SECONDS)
        code = sayo_mini.main(argv)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(code or 0)


def outcome(folder, status):
    """Returns: (exit code, or the negative signal number; stdout; stderr) of an ended process."""
    out, err = ((folder / n).read_text(errors="replace") for n in ("stdout", "stderr"))
    return os.waitstatus_to_exitcode(status), out, err


def in_fork(folder, argv):
    return outcome(folder, os.waitpid(start(folder, argv), 0)[1])


def judge(folder, done, code, out, err):
    """Returns: what is wrong with the outcome, or None."""
    shown = [line.rpartition("\r")[2] for line in err.splitlines()]
    lines = [line for line in shown if line.strip() and not re.search(r"\d+%\||it/s|s/it", line)]
    if "Traceback" in out + err:
        return "traceback"
    if code not in (0, 2):
        return f"exit code {code}"
    reported = code == 2 and re.search(r"\d problems?\n\Z", out)  # by `check`, on stdout
    if len(lines) > 1 or (code == 2 and not reported and not lines):
        return f"{len(lines)} lines on stderr"
    return unreadable(folder / "run", done)


def unreadable(run, done):
    """Returns: which file of the run is broken, apart from the damaged one, or None."""
    for path in sorted(run.glob("*")) if run.is_dir() else []:
        if path.name.startswith("unfinished-"):
            return f"left behind: {path.name}"
        try:
            if path.name in CHECKPOINTS:
                load_checkpoint(path)
            elif path.suffix == ".json":
                json.loads(path.read_text())
            elif path.suffix == ".jsonl":
                [json.loads(line) for line in path.read_text().splitlines()]
        except Exception as error:
            if not done.startswith(path.name):
                return f"{path.name} is not readable: {error!r:.80}"
    return None


def run_cases(cases, inputs, folder, jobs=2):
    """Run (kind, number, seed) cases, `jobs` at a time. Returns: a list of dicts for the JSON."""
    waiting, running, results = list(cases), {}, []
    while waiting or running:
        while waiting and len(running) < jobs:
            kind, number, seed = waiting.pop(0)
            home = folder / f"{kind}-{number}"
            home.mkdir()
            argv, done = make_case(kind, random.Random(f"{seed} {kind} {number}"), inputs, home)
            running[start(home, argv)] = f"{kind}:{number}", home, argv, done
        pid, status = os.wait()
        case, home, argv, done = running.pop(pid)
        code, out, err = outcome(home, status)
        problem = judge(home, done, code, out, err)
        last = err.strip().splitlines()[-1:] if problem or code else []
        message = last[0].rpartition("\r")[2][:300] if last else ""
        result = {"case": case, "done": done, "argv": argv, "exit": code, "message": message}
        results.append(result | {"problem": problem})
        print(
            f"{case:14}{code:4}  {done[:90]}" + f"\n  BROKE: {problem}: {message}" * bool(problem)
        )
    return results


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--each", type=int, default=40, help="mutations of each kind (default: 40)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", metavar="KIND:NUMBER", help="run one mutation and keep its files")
    args = parser.parse_args()
    torch.set_num_threads(1)
    folder, began = Path(tempfile.mkdtemp(prefix="fuzz-")), time.time()
    inputs = folder / "inputs"
    inputs.mkdir()
    make_inputs(inputs)
    if args.only:
        kind, number = args.only.split(":")
        (result,) = run_cases([(kind, int(number), args.seed)], inputs, folder)
        print(f"cd {folder / f'{kind}-{number}'}; python {ROOT}/sayo_mini.py", *result["argv"])
        return bool(result["problem"])
    cases = [(kind, i, args.seed) for i in range(args.each) for kind in KINDS]
    results = run_cases(cases, inputs, folder)
    broke = [result for result in results if result["problem"]]
    for result in broke:
        print(f"{result['case']}: {result['problem']}: {result['done']}\n  {result['message']}")
    codes = Counter(result["exit"] for result in results)
    counts = ", ".join(f"{code}: {codes[code]}" for code in sorted(codes))
    seconds = time.time() - began
    print(f"{len(results)} mutations in {seconds:.0f} s, exit codes {counts}; {len(broke)} broke")
    content = {"machine": machine(), "seed": args.seed, "mutations": results}
    write_atomically(RESULTS / "fuzz.json", json.dumps(content, indent=1) + "\n")
    shutil.rmtree(folder)
    return bool(broke)


if __name__ == "__main__":
    sys.exit(main())
