"""The parts of `gpu.py`: `python study/gpu_parts.py NAME` runs one. Each yields what it has found,
and all of it so far is printed as a line of JSON, so that a part that is stopped keeps it."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
if sys.argv[1] == "card":
    os.environ["TORCH_CUDNN_SDPA_DEPRIORITIZED"] = "0"  # it measures what cuDNN would cost
import sayo_mini  # before torch, because it sets environment variables that torch reads

# isort: split
import torch
from bitsandbytes.nn import Linear4bit
from torch.nn.functional import scaled_dot_product_attention as sdpa
from torch.profiler import ProfilerActivity, profile

import decoding
from config import Config
from model import load_vlm
from study.common import machine
from study.random_model import make_model, make_question
from study.step import compare
from study.step_arms import LEARNING, Timer

SMALL = "--small" in sys.argv
SHAPE, DEVICE = ("30m", "cpu") if SMALL else ("2b", "cuda")
MODELS = Path("/tmp" if SMALL or not Path("/dev/shm").exists() else "/dev/shm") / "sayo-models"
G, PROMPT, ANSWER = (2, 100, 12) if SMALL else (8, 1100, 110)


def card():
    yield machine()
    if SMALL:
        return
    size = round(torch.cuda.get_device_properties(0).total_memory / 2**30, 1)
    yield {"GB": size, "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    x, y = torch.empty(2, 2**31, dtype=torch.uint8, device="cuda")
    yield {"copy TB/s": round(2 * 2**31 / timed(lambda: y.copy_(x)) / 1e12, 2)}
    for rows in (8, 32, 2000, 8192):
        a, b = (torch.randn(n, 6144, device="cuda").bfloat16() for n in (rows, 6144))
        rate = 2 * rows * 6144**2 / timed(lambda: a @ b.T)
        yield {f"bf16 TFLOP/s, {rows} rows": round(rate / 1e12, 1)}
    for N, K in ((2048, 2048), (1024, 2048), (6144, 2048), (2048, 6144)):  # a layer of 2B in NF4
        layer = Linear4bit(K, N, False, compute_dtype=torch.bfloat16, quant_type="nf4").cuda()
        for rows in (8, 32, 64):
            x = torch.randn(rows, K, device="cuda").bfloat16()
            with torch.no_grad():
                seconds = timed(lambda: layer(x), graph=True)
            yield {f"NF4 µs {N}x{K}, {rows} rows": round(1e6 * seconds, 1)}
    for cudnn in (True, False):
        torch.backends.cuda.enable_cudnn_sdp(cudnn)
        for P in (0, 1100):
            name = "completions" if P else "prompt"
            yield {f"SDPA {name}, cudnn {'on' if cudnn else 'off'}": attention_kernel(P, cudnn)}


def attention_kernel(P, cudnn):
    """Which kernel the attention of a prompt gets (P 0), or of completions that see one of P
    tokens, and the ms of the first and second call of each new length."""
    found = []
    for change in (0, 3, 5, 7):  # 0 only warms up; the other lengths are new
        extra = change + 20 * cudnn
        rows, S, L, heads = (8, 110, 1210 + extra, 16) if P else (1, *[1100 + extra] * 2, 8)
        q = torch.randn(rows, 16, S, 128, device="cuda").bfloat16().requires_grad_()
        k = torch.randn(rows, heads, L, 128, device="cuda").bfloat16().requires_grad_()
        mask = torch.ones(1, 1, S, L, device="cuda").bool().tril(L - S) if P else None
        choice = torch._fused_sdp_choice(q, k, k, mask, 0.0, not P, enable_gqa=not P)
        for _ in range(2):
            start = time.perf_counter()
            sdpa(q, k, k, attn_mask=mask, is_causal=not P, enable_gqa=not P).sum().backward()
            torch.cuda.synchronize()
            found.append(round(1e3 * (time.perf_counter() - start), 2))
    return [("math", "flash", "efficient", "cudnn")[choice], *found]


def tests():
    flags = "-q --tb=short -p no:cacheprovider -ra --durations=5 tests/test_cuda.py".split()
    flags += ["-k", "nan or cuda_graph"] if SMALL else []
    env = os.environ | ({"TEST_DEVICE": "cpu"} if SMALL else {})
    done = run(["-m", "pytest", *flags], env=env)
    lines = done.stdout.strip().splitlines()
    failed = [line[:300] for line in lines if line.startswith(("FAILED", "ERROR"))]
    yield {"last": lines[-1:], "failed tests": failed}
    done.check_returncode()


def decode():
    vlm = load()
    timer = Timer(vlm.device)

    def sample(prompts, rows, texts):
        times = []
        for _ in range(3):
            generator, start = torch.Generator(vlm.device).manual_seed(0), timer.now()
            groups = vlm.sample_groups(prompts, rows, ANSWER, 1.0, generator)
            times.append(round(timer.now() - start, 3))
        texts.append(torch.cat([group.ids for group in groups]))
        same = (texts[-1] == texts[0]).float().mean().item()
        return {"s": times, "tokens as eager": round(same, 3), "peak GB": peak()}

    for questions, rows in ((2, 2),) if SMALL else ((1, 8), (4, 8), (8, 8)):
        example, texts = make_question(vlm, PROMPT), []
        prompts = [vlm.encode(example.image, example.question) for _ in range(questions)]
        for name in ("eager", "graph", "graph and dequantized"):
            vlm.cuda_graph = name != "eager"
            decoding.room_for_weights = lambda *_, name=name: "dequantized" in name
            yield attempt(f"{name}, {questions * rows} rows", sample, prompts, rows, texts)


def step():
    vlm, Q = load(gradient_checkpointing=True), 2 if SMALL else 4
    params = [p for p in vlm.model.parameters() if p.requires_grad]
    optimizer, timer = torch.optim.AdamW(params, lr=1e-5), Timer(vlm.device)
    generator = torch.Generator(vlm.device).manual_seed(0)
    for name in ("sample", "score_and_reward", "update"):
        timer.wrap(sayo_mini, name, name)

    def run_steps(lengths):
        return [run_step(P, C) for P, C in lengths[: 1 if SMALL else None]]

    def run_step(P, C):
        settings = dict(num_generations=G, max_completion_length=C, prompts_per_step=Q)
        cfg = Config(**settings, instruction="", **LEARNING)
        examples = [make_question(vlm, P + i) for i in range(Q)]
        timer.seconds.clear()
        start = timer.now()
        sayo_mini.train_step(vlm, examples, cfg, optimizer, generator)
        found = {"s": timer.now() - start} | timer.seconds
        return {name: round(seconds, 3) for name, seconds in found.items()} | {"peak GB": peak()}

    points = {
        "same lengths": [(PROMPT, ANSWER)] * 3,
        "new lengths": [(PROMPT - 7 * i, ANSWER - i) for i in range(1, 4)],
        "P 384": [(60 if SMALL else 384, ANSWER)] * 3,
    }
    for name, lengths in points.items():
        for vlm.cuda_graph in (True,) if SMALL else (False, True):
            how = "graph" if vlm.cuda_graph else "eager"
            yield attempt(f"{how}, {name}", run_steps, lengths)
    if not SMALL:
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            run_step(PROMPT, ANSWER)
        rows = sorted(profiler.key_averages(), key=lambda e: -e.device_time_total)[:25]
        rows = [[e.key[:90], round(e.device_time_total / 1e3, 1), e.count] for e in rows]
        yield {"longest kernels, ms and count": rows}


def tiny():
    out = MODELS / "tiny-run"
    shutil.rmtree(out, ignore_errors=True)  # of an earlier start
    flags = ["--model_name_or_path", "tiny", "--device", DEVICE, "--output_dir", str(out)]
    flags += "--max_steps 2 --eval_examples 4".split() if SMALL else []
    run(["sayo_mini.py", *flags]).check_returncode()
    for name in ("before", "after"):
        rows = json.loads((out / f"{name}.json").read_text())
        for score in ("correct", "auroc"):
            yield {f"{score} {name}": round(sum(row[score] for row in rows) / len(rows), 3)}
    rows = [json.loads(line) for line in (out / "timing.jsonl").read_text().splitlines()]
    yield {"s per step": sorted(row["seconds"] for row in rows)[len(rows) // 2]}


def trl():
    folder = make_model(SHAPE, MODELS, DEVICE)
    options = dict(device=DEVICE, load_in_4bit=True, gradient_checkpointing=True)
    options |= dict(cuda_graph=not SMALL)  # of ours
    for point in [(60, 4, 2)] if SMALL else [(512, 64, 8), (1100, 110, 8)]:
        costs = compare(point, ("ours", "trl"), 1 if SMALL else 3, folder, options)
        for arm, (first, *rows) in costs.items():
            seconds = [round(row["seconds"], 3) for row in rows]
            yield {f"{arm}, P, C, G = {point}": {"s": seconds, "MB": first["peak"] // 10**6}}


# --- helpers ---


def load(**settings):
    vlm = load_vlm(make_model(SHAPE, MODELS, DEVICE), device=DEVICE, **settings)
    vlm.stop_ids = vlm.stop_ids[:0]  # no completion ends early
    return vlm


def attempt(key, function, *args):
    """{key: the result}, or its error, so that the next measurement runs."""
    peak()
    try:
        return {key: function(*args)}
    except Exception as error:
        return {key: f"{type(error).__name__}: {str(error)[:300]}"}


def run(command, **settings):
    """Run Python in the repository's root, and print the end of what it wrote."""
    command = [sys.executable, *command]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, **settings)
    print(done.stdout[-6000:], done.stderr[-2500:])
    return done


def peak():
    """GB allocated at most since the last call."""
    if SMALL:
        return None
    value = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    torch.cuda.reset_peak_memory_stats()
    return value


def timed(function, graph=False, repeats=20):
    """Median seconds, by events."""
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


if __name__ == "__main__":
    found = {}
    for more in globals()[sys.argv[1]]():
        found |= more
        print(json.dumps(found), flush=True)
