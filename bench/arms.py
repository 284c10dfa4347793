"""The three that `step.py` compares, each in a process of its own: it loads the model, then does one optimiser step
whenever it is asked to, and says what the step has cost."""

import ctypes
import gc
import os
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread

import torch
from peft import LoraConfig
from transformers import AutoModelForImageTextToText, DynamicCache, TrainerCallback

sys.path.insert(0, str(Path(__file__).parent.parent))
import attention
import model
import sayo_mini
from bench.shapes import question
from config import Config

LEARNING = dict(learning_rate=1e-5, weight_decay=0.0, max_grad_norm=0.8, beta=0.001, temperature=1.0)


class Memory:
    """The peak of one step in bytes, above what the loaded model takes: `max_memory_allocated` on CUDA, elsewhere the
    process's own resident memory (Linux). From then on freed tensors go back to the system at once: else what lies
    about in the heap of earlier steps would be counted."""

    def __init__(self, device):
        self.cuda = device.type == "cuda"
        gc.collect()
        self.allocate_from(2**16)
        self.base = torch.cuda.memory_allocated() if self.cuda else self.resident()

    def allocate_from(self, size):
        """Let tensors of more than `size` bytes have pages of their own. The library's usual 32 MiB are faster."""
        if not self.cuda:
            libc = ctypes.CDLL(None)
            libc.mallopt(-3, size)  # M_MMAP_THRESHOLD
            libc.malloc_trim(0)

    def resident(self):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

    @contextmanager
    def watch(self):
        """Sets `peak`."""
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
            yield
            self.peak = torch.cuda.max_memory_allocated() - self.base
            return
        seen, done = [self.resident()], Event()

        def look():
            while not done.wait(0.002):
                seen.append(self.resident())

        thread = Thread(target=look)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
        self.peak = max(seen) - self.base


class Clock:
    """Seconds spent inside wrapped functions, by name."""

    def __init__(self, device):
        self.device, self.seconds = device, {}

    def now(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    @contextmanager
    def measure(self, name):
        start = self.now()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + self.now() - start

    def wrap(self, holder, attribute, name, when=lambda kwargs: True):
        """Count every call of a function or method to `name`, if `when(its keyword arguments)`."""
        inner = getattr(holder, attribute)

        def timed(*args, **kwargs):
            if not when(kwargs):
                return inner(*args, **kwargs)
            with self.measure(name):
                return inner(*args, **kwargs)

        setattr(holder, attribute, timed)


def count(core):
    """Hooks that count the tokens through the language model and the patches through the vision tower; recomputation
    for gradient checkpointing is not seen."""
    seen = {"tokens": 0, "patches": 0}

    def tokens(module, args, kwargs):
        seen["tokens"] += kwargs["inputs_embeds"].shape[:2].numel()

    def patches(module, args, kwargs):
        seen["patches"] += (args[0] if args else kwargs["hidden_states"]).shape[0]

    core.model.language_model.register_forward_pre_hook(tokens, with_kwargs=True)
    core.model.visual.register_forward_pre_hook(patches, with_kwargs=True)
    return seen


def worker(pipe, arm, folder, point, options):
    """One arm at one point: answers every "step" with what that step has cost, until told to stop."""
    os.chdir(tempfile.mkdtemp())
    (trl if arm == "trl" else ours)(pipe, arm, folder, point, options)


def ours(pipe, arm, folder, point, options):
    vlm = model.load_vlm(folder, options["load_in_4bit"], device=options["device"],
                         gradient_checkpointing=options["gradient_checkpointing"],
                         layers=options.get("layers", (-1,)))  # fmt: skip
    if arm == "naive":
        repeat_prompt(vlm, point[2])
    clock = Clock(vlm.device)
    clock.wrap(sayo_mini, "ask", "sample")
    clock.wrap(vlm, "sample_groups", "sample")
    clock.wrap(vlm, "score", "score", when=lambda kwargs: kwargs.get("reference"))
    clock.wrap(attention, "image_attention", "capture")
    step = our_step(vlm, *point)
    for _ in turns(pipe, clock, vlm.core, Memory(vlm.device)):
        step()


def our_step(vlm, P, C, G, image_tokens=None, completions_per_forward=0):
    """A function that does one optimiser step with one question of P tokens and G answers of C tokens."""
    vlm.completions_per_forward = completions_per_forward or vlm.completions_per_forward
    cfg = Config(num_generations=G, max_completion_length=C, instruction="", prompts_per_step=1,
                 completions_per_forward=completions_per_forward, **LEARNING)  # fmt: skip
    vlm.stop_ids = vlm.stop_ids[:0]  # every answer goes on to the end
    optimizer = torch.optim.AdamW([p for p in vlm.model.parameters() if p.requires_grad], lr=1e-5, weight_decay=0.0)
    generator = torch.Generator(vlm.device).manual_seed(0)
    example = question(vlm, P, image_tokens)

    def step():
        metrics, _ = sayo_mini.train_step(vlm, [example], cfg, optimizer, generator)
        assert metrics["frac_reward_zero_std"] == 0 and metrics["num_tokens"] == G * C

    return step


def repeat_prompt(vlm, G):
    """What a trainer without a shared prefix does: the prompt and its image, G times, in every forward."""
    vlm.completions_per_forward, shared, cache = 1, vlm._forward, None

    def forward(prompt, ids, positions, **kwargs):
        nonlocal cache
        if prompt is None:  # decoding, each answer with a cache of its own
            return shared(None, ids, positions, **(kwargs | {"past_key_values": cache, "prefix": None}))
        prompt.features = None  # the vision tower runs again
        if not kwargs.get("use_cache"):
            return shared(prompt, ids, positions, **kwargs)
        pixels, grid = prompt.pixel_values, prompt.image_grid_thw
        prompt.pixel_values, prompt.image_grid_thw = pixels.repeat(G, 1), grid.repeat(G, 1)
        hidden, cache = shared(prompt, ids.expand(G, -1), positions.expand(3, G, -1), **kwargs)
        prompt.pixel_values, prompt.image_grid_thw = pixels, grid
        one = DynamicCache()  # asked for, never looked at
        for index, layer in enumerate(cache.layers):
            one.update(layer.keys[:1], layer.values[:1], index)
        return hidden, one

    vlm._forward = forward


def trl(pipe, arm, folder, point, options):
    from datasets import Dataset  # here, because loading both takes seconds and memory
    from trl import GRPOConfig, GRPOTrainer

    from scale_trl import Processor

    P, C, G = point
    vlm = model.load_vlm(folder, options["load_in_4bit"], device=options["device"])  # for tokens, pixels, data types
    example, device, dtype = question(vlm, P), vlm.device, vlm.core.dtype
    processor = Processor(vlm.image_processor, vlm.tokenizer)
    quantization = vlm.core.config.quantization_config if options["load_in_4bit"] else None
    del vlm
    policy = AutoModelForImageTextToText.from_pretrained(
        folder, dtype=dtype, quantization_config=quantization, attn_implementation="sdpa", device_map={"": device}
    )
    for module in policy.modules():  # see load_vlm
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    args = GRPOConfig(
        output_dir="trl", per_device_train_batch_size=G, num_generations=G, max_completion_length=C, max_steps=1000,
        gradient_checkpointing=options["gradient_checkpointing"],
        gradient_checkpointing_kwargs={"use_reentrant": False}, use_cpu=device.type == "cpu",
        bf16=dtype == torch.bfloat16, fp16=dtype == torch.float16, report_to="none",
        save_strategy="no", logging_steps=10**6, disable_tqdm=True, top_k=0, generation_kwargs={"min_new_tokens": C},
        **LEARNING,
    )  # fmt: skip
    chat = [{"role": "user", "content": example.question}]
    data = Dataset.from_list([{"prompt": chat, "image": example.image}] * 8)
    clock = Clock(device)

    class Turns(TrainerCallback):
        """The trainer's own loop, halted between its steps."""

        def on_train_begin(self, args, state, control, **kwargs):
            core = trainer.accelerator.unwrap_model(trainer.model).get_base_model()
            self.turns = turns(pipe, clock, core, Memory(device))
            next(self.turns)

        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = next(self.turns, "stop") == "stop"

    def constant(prompts, **kwargs):
        return [float(i % 2) for i in range(len(prompts))]

    trainer = GRPOTrainer(
        policy, constant, args, data, processing_class=processor, callbacks=[Turns()],
        peft_config=LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules=model.LINEAR))  # fmt: skip
    clock.wrap(trainer, "_generate", "sample")
    clock.wrap(trainer, "_generate_and_score_completions", "sample and score")
    trainer.train()


def turns(pipe, clock, core, memory):
    """Yield once for every step asked for, and send what it has cost when the caller comes back; the first is weighed,
    the others timed. To begin with, send the number of weights that are trained."""
    seen = count(core)
    pipe.send(sum(p.numel() for p in core.parameters() if p.requires_grad))
    pipe.recv()
    with memory.watch():
        yield
    memory.allocate_from(2**25)
    pipe.send({"peak": memory.peak})
    while pipe.recv() == "step":
        clock.seconds.clear()
        seen.update(tokens=0, patches=0)
        start = clock.now()
        yield
        total, part = clock.now() - start, dict(clock.seconds)
        if "sample and score" in part:
            part["score"] = part.pop("sample and score") - part["sample"]
        part.setdefault("score", 0.0)
        pipe.send({"seconds": total, **part, "update": total - part["sample"] - part["score"], **seen})
