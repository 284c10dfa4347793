"""The three variants ("arms") of `step.py`: ours, ours without the shared prompt ("naive"), TRL.
Each has its own process, makes one optimizer step on every request, and sends back its cost."""

import ctypes
import gc
import os
import tempfile
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from threading import Event, Thread

import torch
from transformers import TrainerCallback

import attention
import sayo_mini
from config import Config
from model import Completions, Scores, Vlm, load_vlm
from study.random_model import make_question

LEARNING = dict(
    learning_rate=1e-5, weight_decay=0.0, max_grad_norm=0.8, beta=0.001, temperature=1.0
)


# --- measuring ---


@contextmanager
def peak_memory(device):
    """Yields a dict that will have the "peak" memory of the block, in bytes above that before it.

    On CUDA this is `max_memory_allocated`, elsewhere the anonymous resident memory of the process
    (Linux only). On the CPU, large tensors get their own pages within the block, so that freed
    memory returns to the system immediately and earlier steps do not count.
    """
    found = {}
    gc.collect()
    if device.type == "cuda":
        found["peak"] = -torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        yield found
        found["peak"] += torch.cuda.max_memory_allocated()
        return
    set_mmap_threshold(2**16)
    samples, done = [resident_memory()], Event()

    def poll():
        while not done.wait(0.002):
            samples.append(resident_memory())

    thread = Thread(target=poll, daemon=True)
    thread.start()
    yield found
    done.set()
    thread.join()
    set_mmap_threshold(2**25)
    found["peak"] = max(samples) - samples[0]


def set_mmap_threshold(size):
    """Allocate tensors of more than `size` bytes in their own pages. A large value such as glibc's
    32 MiB is faster."""
    libc = ctypes.CDLL(None)
    libc.mallopt(-3, size)  # M_MMAP_THRESHOLD
    libc.malloc_trim(0)


def resident_memory():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


class Timer:
    """Seconds spent in wrapped functions, summed by name."""

    def __init__(self, device):
        self.device, self.seconds = device, {}

    def now(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def wrap(self, holder, attribute, name, when=lambda kwargs: True):
        """Add the time of every call of a function or method to `name`, if `when` is true for its
        keyword arguments."""
        inner = getattr(holder, attribute)

        def timed(*args, **kwargs):
            if not when(kwargs):
                return inner(*args, **kwargs)
            start = self.now()
            result = inner(*args, **kwargs)
            self.seconds[name] = self.seconds.get(name, 0.0) + self.now() - start
            return result

        setattr(holder, attribute, timed)


# --- one process per arm ---


def worker(pipe, arm, folder, point, options):
    """The process of one variant at one point (P, C, G): see `serve_steps`."""
    os.chdir(tempfile.mkdtemp())
    if arm == "trl":
        return run_trl(pipe, folder, point, options)
    return run_ours(pipe, NaiveVlm if arm == "naive" else Vlm, folder, point, options)


def serve_steps(pipe, timer, model):
    """Yield for every step requested through the pipe. When the caller comes back, send its cost.

    Sends the number of trained parameters first. For the first step the memory is measured, for the
    others the time.
    """
    pipe.send(sum(p.numel() for p in model.parameters() if p.requires_grad))
    pipe.recv()
    with peak_memory(timer.device) as memory:
        yield
    pipe.send(memory)
    while pipe.recv():
        timer.seconds.clear()
        start = timer.now()
        yield
        total, parts = timer.now() - start, dict(timer.seconds)
        if "sample and score" in parts:
            parts["score"] = parts.pop("sample and score") - parts["sample"]
        update = total - parts["sample"] - parts["score"]
        pipe.send({"seconds": total, **parts, "update": update})


def run_ours(pipe, vlm_class, folder, point, options):
    P, C, G = point
    vlm = load_vlm(
        folder,
        load_in_4bit=options["load_in_4bit"],
        device=options["device"],
        gradient_checkpointing=options["gradient_checkpointing"],
    )
    vlm.__class__ = vlm_class
    vlm.cuda_graph = options.get("cuda_graph", False)
    vlm.stop_ids = vlm.stop_ids[:0]  # no completion ends early
    timer = Timer(vlm.device)
    timer.wrap(vlm, "encode", "sample")
    timer.wrap(vlm, "sample_groups", "sample")
    timer.wrap(vlm, "score_groups", "score", when=lambda kwargs: kwargs.get("reference"))
    timer.wrap(attention, "image_attention", "capture")
    settings = dict(num_generations=G, max_completion_length=C, prompts_per_step=1, instruction="")
    cfg = Config(**settings, **LEARNING)
    params = [p for p in vlm.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, cfg.learning_rate, weight_decay=cfg.weight_decay)
    generator = torch.Generator(vlm.device).manual_seed(0)
    examples = [make_question(vlm, P)]
    for _ in serve_steps(pipe, timer, vlm.model):
        metrics, _ = sayo_mini.train_step(vlm, examples, cfg, optimizer, generator)
        assert metrics["frac_reward_zero_std"] == 0 and metrics["num_tokens"] == G * C


class NaiveVlm(Vlm):
    """A trainer without a shared prompt: every forward pass has a batch of G rows, each with the
    image, the prompt and one completion. All completions have the same length."""

    def sample_groups(self, prompts, num_generations, *args, **kwargs):
        (prompt,) = prompts
        rows = super().sample_groups(self.copies(prompt, num_generations), 1, *args, **kwargs)
        ids, mask = torch.cat([row.ids for row in rows]), torch.cat([row.mask for row in rows])
        texts, finished = [row.texts[0] for row in rows], torch.cat([row.finished for row in rows])
        return [Completions(ids, mask, texts, rows[0].temperature, finished)]

    def score_groups(self, prompts, completions, attention=True, reference=False):
        (prompt,), (group,) = prompts, completions
        G = len(group.ids)
        rows = [group[i : i + 1] for i in range(G)]
        rows = super().score_groups(self.copies(prompt, G), rows, attention, reference)
        scores = Scores(torch.cat([r.logps for r in rows]), torch.cat([r.entropy for r in rows]))
        if attention:
            scores.attention = torch.cat([row.attention for row in rows])
            scores.prompt_attention = rows[0].prompt_attention
        return [scores]

    def copies(self, prompt, G):
        return [replace(prompt, features=None) for _ in range(G)]  # the vision tower runs G times


# --- TRL ---


def run_trl(pipe, folder, point, options):
    """The same tokens, image size and data types as ours, and a new adapter of the same form."""
    from datasets import Dataset  # here, because both are slow to import and take memory
    from trl import GRPOConfig, GRPOTrainer

    from extras.scale_trl import TrlProcessor, forbid_placeholders

    P, C, G = point
    vlm = load_vlm(folder, options["load_in_4bit"], device=options["device"])
    timer, example = Timer(vlm.device), make_question(vlm, P)
    forbid_placeholders(vlm)
    lora, policy = vlm.model.peft_config["default"], vlm.model.unload()
    policy.set_attn_implementation("sdpa")
    args = GRPOConfig(
        output_dir="trl",
        per_device_train_batch_size=G,
        num_generations=G,
        max_completion_length=C,
        max_steps=1000,
        activation_checkpointing=options["gradient_checkpointing"],
        loss_type="dapo",  # the loss of reward.grpo_loss
        use_bias_correction_kl=False,
        use_cpu=vlm.device.type == "cpu",
        bf16=policy.dtype == torch.bfloat16,
        fp16=policy.dtype == torch.float16,
        report_to="none",
        save_strategy="no",
        logging_steps=10**6,
        disable_tqdm=True,
        top_k=0,
        generation_kwargs={"min_new_tokens": C},
        **LEARNING,
    )
    chat = [{"role": "user", "content": example.question}]
    data = Dataset.from_list([{"prompt": chat, "image": example.image}] * 8)
    processor = TrlProcessor(vlm.image_processor, vlm.tokenizer, vlm.core.config)

    def constant_rewards(prompts, **kwargs):
        return [float(i % 2) for i in range(len(prompts))]

    class StepOnRequest(TrainerCallback):
        """Stops the trainer's own loop between its steps."""

        def on_train_begin(self, args, state, control, **kwargs):
            self.steps = serve_steps(pipe, timer, trainer.model)
            next(self.steps)

        def on_step_end(self, args, state, control, **kwargs):
            next(self.steps)

    settings = dict(processing_class=processor, peft_config=lora, callbacks=[StepOnRequest()])
    trainer = GRPOTrainer(policy, constant_rewards, args, data, **settings)
    timer.wrap(trainer, "_generate", "sample")
    timer.wrap(trainer, "_generate_and_score_completions", "sample and score")
    trainer.train()
