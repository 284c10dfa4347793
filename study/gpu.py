"""What is worth knowing from one short call on a GPU, most valuable first.

    python study/gpu.py OUT 470           # a folder, and the seconds it may take in all
    python study/gpu.py OUT 600 --small   # a check of this script on a CPU

Every part runs in its own process with its own limit. OUT/gpu.json is rewritten after each part,
so a kill loses only the part in flight. OUT/gpu.log has all output. The table is printed last.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
SMALL = "--small" in sys.argv
MODELS = Path("/dev/shm" if Path("/dev/shm").exists() and not SMALL else "/tmp") / "sayo-models"
SHAPE, DEVICE = ("30m", "cpu") if SMALL else ("2b", "cuda")
PARTS = {  # name -> most seconds, in the order of their value
    "card": 60,  # versions, ceilings, which kernels attention and 4-bit products get
    "tests": 130,  # tests/test_cuda.py; the random model is written meanwhile
    "decode": 80,  # seconds per token: eager, graph, dequantized once; are the tokens equal?
    "step": 110,  # seconds and memory of real steps, lengths fixed and new
    "tiny": 100,  # the whole quick start: does it learn?
    "trl": 150,  # ours and TRL at two points
}


# --- parts; each prints one line of JSON last ---


def card():
    import torch

    from study.common import machine

    found = machine()
    if SMALL:
        return found
    found |= {"cudnn": torch.backends.cudnn.version(), "cuda": torch.version.cuda}
    found["GB"] = round(torch.cuda.get_device_properties(0).total_memory / 2**30, 1)
    x, y = torch.empty(2, 2**31, dtype=torch.uint8, device="cuda")
    found["copy TB/s"] = round(2 * 2**31 / timed(lambda: y.copy_(x)) / 1e12, 2)
    for rows in (8, 32, 2000, 8192):
        a, b = (torch.randn(n, 6144, device="cuda").bfloat16() for n in (rows, 6144))
        rate = 2 * rows * 6144**2 / timed(lambda: a @ b.T)
        found[f"bf16 TFLOP/s, {rows} rows"] = round(rate / 1e12, 1)
    return found | nf4_products() | attention_kernels()


def nf4_products():
    """Microseconds of the products of a layer with 4-bit weights, launched by a graph."""
    import torch
    from bitsandbytes.nn import Linear4bit

    found = {}
    for N, K in ((2048, 2048), (1024, 2048), (6144, 2048), (2048, 6144)):
        layer = Linear4bit(K, N, False, compute_dtype=torch.bfloat16, quant_type="nf4").cuda()
        for rows in (8, 32, 64):
            x = torch.randn(rows, K, device="cuda").bfloat16()
            with torch.no_grad():
                seconds = timed(lambda: layer(x), graph=True)
            found[f"NF4 µs {N}x{K}, {rows} rows"] = round(1e6 * seconds, 1)
    return found


def attention_kernels():
    """Which kernel attention gets, and what its first call of a new length costs."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention as sdpa

    found, calls, names = {}, {}, ("math", "flash", "efficient", "cudnn")
    for cudnn in (True, False):
        torch.backends.cuda.enable_cudnn_sdp(cudnn)
        for P in (0, 1100):  # the prompt itself, then completions that see a prompt
            key = f"SDPA {'completions' if P else 'prompt'}, cudnn {'on' if cudnn else 'off'}"
            for change in (0, 3, 5, 7):  # 0 only warms up; the other lengths are new
                extra = change + 20 * cudnn
                G, S, L, heads = (8, 110, 1210 + extra, 16) if P else (1, *[1100 + extra] * 2, 8)
                q = torch.randn(G, 16, S, 128, device="cuda").bfloat16().requires_grad_()
                k = torch.randn(G, heads, L, 128, device="cuda").bfloat16().requires_grad_()
                mask = torch.ones(1, 1, S, L, device="cuda").bool().tril(L - S) if P else None
                settings = dict(attn_mask=mask, is_causal=not P, enable_gqa=not P)
                choice = torch._fused_sdp_choice(q, k, k, mask, 0.0, not P, enable_gqa=not P)
                found[key] = names[choice]
                seconds = []
                for _ in range(2):
                    start = time.perf_counter()
                    sdpa(q, k, k, **settings).sum().backward()
                    torch.cuda.synchronize()
                    seconds.append(round(1e3 * (time.perf_counter() - start), 2))
                calls.setdefault(key, []).append(seconds)
    return found | {"SDPA ms, first and second call of a length": calls}


def tests():
    write = subprocess.Popen([sys.executable, __file__, "part", "weights", *sys.argv[3:]])
    env = os.environ | ({"TEST_DEVICE": "cpu"} if SMALL else {})
    flags = "-q --tb=short -p no:cacheprovider -ra --durations=5 tests/test_cuda.py".split()
    if SMALL:
        flags += ["-k", "nan or cuda_graph"]
    done = run(["-m", "pytest", *flags], env=env)
    write.wait()
    lines = done.stdout.strip().splitlines()
    failed = [line[:300] for line in lines if line.startswith(("FAILED", "ERROR"))]
    return {"exit": done.returncode, "last": lines[-1:], "failed": failed}


def weights():
    """The random model. On a GPU it is drawn there: a CPU takes half a minute."""
    import torch

    from study.random_model import make_model

    real = torch.Tensor.normal_
    if not SMALL:
        torch.Tensor.normal_ = lambda x, mean, std, generator=None: x.copy_(
            real(torch.empty(x.shape, device="cuda", dtype=torch.bfloat16), mean, std)
        )
    return {"folder": str(make_model(SHAPE, MODELS, DEVICE))}


def load(**settings):
    from model import load_vlm
    from study.random_model import make_model

    vlm = load_vlm(make_model(SHAPE, MODELS, DEVICE), device=DEVICE, **settings)
    vlm.stop_ids = vlm.stop_ids[:0]  # no completion ends early
    return vlm


def decode():
    import sayo_mini  # noqa: F401 (sets what torch reads when it loads)

    # isort: split
    import torch

    import decoding
    from study.random_model import make_question

    vlm, found, C, texts = load(), {}, 3 if SMALL else 110, {}
    variants = [("eager", False, False), ("graph", True, False), ("graph, dequantized", True, True)]
    for questions, G in ((2, 2),) if SMALL else ((1, 8), (4, 8), (8, 8)):
        example = make_question(vlm, 60 if SMALL else 1100)
        prompts = [vlm.encode(example.image, example.question) for _ in range(questions)]
        for name, vlm.cuda_graph, dequantize in variants:
            decoding.room_for_weights = lambda core, dtype, answer=dequantize: answer
            times, key = [], f"{name}, {questions * G} rows"
            try:
                for _ in range(3):
                    generator = torch.Generator(vlm.device).manual_seed(0)
                    start = now()
                    groups = vlm.sample_groups(prompts, G, C, 1.0, generator)
                    times.append(round(now() - start, 3))
            except Exception as error:
                found[key] = {"error": f"{type(error).__name__}: {str(error)[:300]}"}
                continue
            texts[key] = torch.cat([group.ids for group in groups])
            same = (texts[key] == texts[f"eager, {questions * G} rows"]).float().mean().item()
            found[key] = {"s": times, "tokens as eager": round(same, 3), "peak GB": peak()}
    return found


def step():
    import sayo_mini

    # isort: split
    import torch

    from config import Config
    from study.random_model import make_question
    from study.step_arms import LEARNING, Timer

    vlm, found = load(gradient_checkpointing=True), {}
    params = [p for p in vlm.model.parameters() if p.requires_grad]
    optimizer, timer = torch.optim.AdamW(params, lr=1e-5), Timer(vlm.device)
    for holder, name in (
        *((sayo_mini, name) for name in ("sample", "score_and_reward", "update")),
        *((vlm, "_prefill"), (sayo_mini, "compute_rewards"), (sayo_mini, "attention_metrics")),
    ):
        timer.wrap(holder, name, name)
    timer.wrap(vlm, "score_groups", "reference", when=lambda kwargs: kwargs.get("reference"))
    generator, (G, Q) = torch.Generator(vlm.device).manual_seed(0), (2, 2) if SMALL else (8, 4)
    base, most = (100, 12) if SMALL else (1100, 110)

    def run_step(P, C):
        settings = dict(num_generations=G, max_completion_length=C, prompts_per_step=Q)
        cfg = Config(**settings, instruction="", **LEARNING)
        examples = [make_question(vlm, P + i) for i in range(Q)]
        timer.seconds.clear()
        start = timer.now()
        sayo_mini.train_step(vlm, examples, cfg, optimizer, generator)
        return timer.now() - start, dict(timer.seconds)

    points = {"same lengths": [(base, most)] * 3}
    points["new lengths"] = [(base - 7 * i, most - i) for i in range(1, 4)]
    points["P 384"] = [(60 if SMALL else 384, most)] * 3
    for vlm.cuda_graph in (True,) if SMALL else (False, True):
        for name, lengths in points.items():
            key = f"{'graph' if vlm.cuda_graph else 'eager'}, {name}"
            peak()
            try:
                rows = [run_step(*point) for point in lengths[: 1 if SMALL else None]]
            except Exception as error:
                found[key] = {"error": f"{type(error).__name__}: {str(error)[:300]}"}
                continue
            _, parts = sorted(rows, key=lambda row: row[0])[len(rows) // 2]
            parts = {name: round(seconds, 3) for name, seconds in parts.items()}
            found[key] = {"s": [round(s, 3) for s, _ in rows], "peak GB": peak(), "median": parts}
    if not SMALL:
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            run_step(base, most)
        rows = sorted(profiler.key_averages(), key=lambda e: -e.device_time_total)[:25]
        rows = [[e.key[:90], round(e.device_time_total / 1e3, 1), e.count] for e in rows]
        found["longest kernels, ms and count"] = rows
    return found


def tiny():
    out = MODELS / "tiny-run"
    shutil.rmtree(out, ignore_errors=True)  # of an earlier start
    flags = ["--model_name_or_path", "tiny", "--device", DEVICE, "--output_dir", str(out)]
    flags += "--max_steps 2 --eval_examples 4".split() if SMALL else []
    start = time.perf_counter()
    done = run(["sayo_mini.py", *flags])
    found = {"exit": done.returncode, "s": round(time.perf_counter() - start, 1)}
    for name in ("before", "after"):
        rows = json.loads((out / f"{name}.json").read_text())
        found[name] = {
            k: round(sum(r[k] for r in rows) / len(rows), 3) for k in ("correct", "auroc")
        }
    rows = [json.loads(line) for line in (out / "timing.jsonl").read_text().splitlines()]
    return found | {"s per step": sorted(row["seconds"] for row in rows)[len(rows) // 2]}


def trl():
    results = MODELS / "step.json"
    results.unlink(missing_ok=True)
    points = ["60,4,2"] if SMALL else ["512,64,8", "1100,110,8"]
    flags = ["--shape", SHAPE, "--device", DEVICE, "--models", str(MODELS), "--points", *points]
    flags += ["--results", str(results), "--rounds", "1" if SMALL else "3"]
    flags += ["--arms", "ours"] if SMALL else ["--arms", "ours", "trl", "--cuda_graph"]
    done, found = run(["study/step.py", *flags]), {}
    for entry in json.loads(results.read_text())["measured"]:
        found[f"P {entry['P']}, C {entry['C']}, G {entry['G']}"] = {
            arm: {"s": [round(r["seconds"], 3) for r in rows[1:]], "MB": rows[0]["peak"] // 10**6}
            for arm, rows in entry["rows"].items()
        }
    return found | {"exit": done.returncode}


# --- helpers ---


def run(command, **settings):
    """Run Python in the repository's root, and print the end of what it wrote."""
    command = [sys.executable, *command]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, **settings)
    print(done.stdout[-6000:], done.stderr[-2500:])
    return done


def now():
    import torch

    if not SMALL:
        torch.cuda.synchronize()
    return time.perf_counter()


def peak():
    """GB allocated at most since the last call."""
    import torch

    if SMALL:
        return None
    value = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    torch.cuda.reset_peak_memory_stats()
    return value


def timed(function, graph=False, repeats=20):
    """Median seconds, by events."""
    import torch

    for _ in range(3):
        function()
    if graph:
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            for _ in range(10):
                function()
        function = captured.replay
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return sorted(times)[repeats // 2] / (10 if graph else 1)


def main():
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    out, end = Path(sys.argv[1]), time.time() + float(sys.argv[2])
    out.mkdir(parents=True, exist_ok=True)
    MODELS.mkdir(parents=True, exist_ok=True)
    results, names = {}, [x for x in sys.argv[3:] if x in PARTS] or PARTS
    with open(out / "gpu.log", "w") as log:
        for name in names:
            left = min(PARTS[name] * (10 if SMALL else 1), end - time.time() - 5)
            if left < 20:
                results[name] = {"skipped": "no time left"}
                continue
            start, limit = time.time(), ["timeout", "-k", "3", str(int(left))]
            command = [*limit, sys.executable, __file__, "part", name, *sys.argv[3:]]
            pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
            process = subprocess.run(command, **pipes, text=True, errors="replace")
            took = round(time.time() - start, 1)
            log.write(f"\n== {name}: exit {process.returncode} after {took} s\n{process.stdout}")
            log.flush()
            lines = [line for line in process.stdout.splitlines() if line.startswith("{")]
            found = json.loads(lines[-1]) if lines else {"failed": process.stdout[-1500:]}
            results[name] = found | {"part exit": process.returncode, "part s": took}
            unfinished = out / "gpu.unfinished"
            unfinished.write_text(json.dumps(results, indent=1))
            os.replace(unfinished, out / "gpu.json")
    for name, found in results.items():
        print(f"\n{name}")
        for key, value in found.items():
            print(f"  {key:44} {str(value)[-600:]}")
    sys.exit(any(found.get("part exit", 1) or found.get("exit") for found in results.values()))


if __name__ == "__main__":
    if sys.argv[1:2] == ["part"]:
        print(json.dumps(globals()[sys.argv[2]]()), flush=True)
    else:
        main()
