"""The three variants ("arms") of `step.py`: ours, ours without the shared prompt ("naive"), TRL.

Each runs in its own process. It loads the model, runs one optimizer step on every request, and
sends back the cost of the step.
"""

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
from peft import LoraConfig
from transformers import AutoModelForImageTextToText, TrainerCallback

import attention
import model
import sayo_mini
from bench.shapes import make_question
from config import Config
from sources.decoding import Decoder
from sources.pretrained import LORA_TARGETS

LEARNING = dict(
    learning_rate=1e-5, weight_decay=0.0, max_grad_norm=0.8, beta=0.001, temperature=1.0
)


class PeakMemory:
    """The peak memory of a step in bytes, above the loaded model.

    On CUDA this is `max_memory_allocated`, elsewhere the anonymous resident memory of the process
    (Linux only). On the CPU, large tensors get their own pages during the measurement, so that
    freed memory returns to the system immediately and earlier steps do not count.
    """

    def __init__(self, device):
        self.cuda, self.peak = device.type == "cuda", None
        gc.collect()
        self.set_mmap_threshold(2**16)
        self.base = torch.cuda.memory_allocated() if self.cuda else self.resident()

    def set_mmap_threshold(self, size):
        """Allocate tensors of more than `size` bytes in their own pages. A large value such as
        glibc's 32 MiB is faster."""
        if not self.cuda:
            libc = ctypes.CDLL(None)
            libc.mallopt(-3, size)  # M_MMAP_THRESHOLD
            libc.malloc_trim(0)

    def resident(self):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

    @contextmanager
    def measure(self):
        """Set `peak` to the peak within the block."""
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
            yield
            self.peak = torch.cuda.max_memory_allocated() - self.base
            return
        samples, done = [self.resident()], Event()

        def poll():
            while not done.wait(0.002):
                samples.append(self.resident())

        thread = Thread(target=poll)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
        self.peak = max(samples) - self.base


class Timer:
    """Seconds spent in wrapped functions, summed by name."""

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
        """Add the time of every call of a function or method to `name`, if `when` is true for its
        keyword arguments."""
        inner = getattr(holder, attribute)

        def timed(*args, **kwargs):
            if not when(kwargs):
                return inner(*args, **kwargs)
            with self.measure(name):
                return inner(*args, **kwargs)

        setattr(holder, attribute, timed)


def count_forward_tokens(core):
    """Count how many tokens pass through the language model and how many patches through
    the vision tower. Recomputation for gradient checkpointing is not counted.
    Returns: a dict that is updated continuously."""
    counts = {"tokens": 0, "patches": 0}

    def count_tokens(module, args, kwargs):
        counts["tokens"] += kwargs["inputs_embeds"].shape[:2].numel()

    def count_patches(module, args, kwargs):
        counts["patches"] += (args[0] if args else kwargs["hidden_states"]).shape[0]

    def count_decoded(step):
        def counted(decoder, token, t):
            counts["tokens"] += len(token)
            return step(decoder, token, t)

        return counted

    Decoder.step = count_decoded(Decoder.step)
    core.model.language_model.register_forward_pre_hook(count_tokens, with_kwargs=True)
    core.model.visual.register_forward_pre_hook(count_patches, with_kwargs=True)
    return counts


def worker(pipe, arm, folder, point, options):
    """The process of one variant at one point (P, C, G): see `serve_steps`."""
    os.chdir(tempfile.mkdtemp())
    run = run_trl if arm == "trl" else run_ours
    run(pipe, arm, folder, point, options)


def serve_steps(pipe, timer, core, memory):
    """Yield for every step requested through the pipe. When the caller comes back, send its cost.

    Sends the number of trained parameters first. For the first step the memory is measured, for the
    others the time.
    """
    counts = count_forward_tokens(core)
    pipe.send(sum(p.numel() for p in core.parameters() if p.requires_grad))
    pipe.recv()
    with memory.measure():
        yield
    memory.set_mmap_threshold(2**25)
    pipe.send({"peak": memory.peak})
    while pipe.recv() == "step":
        timer.seconds.clear()
        counts.update(tokens=0, patches=0)
        start = timer.now()
        yield
        total, part = timer.now() - start, dict(timer.seconds)
        if "sample and score" in part:
            part["score"] = part.pop("sample and score") - part["sample"]
        part.setdefault("score", 0.0)
        update = total - part["sample"] - part["score"]
        pipe.send({"seconds": total, **part, "update": update, **counts})


def run_ours(pipe, arm, folder, point, options):
    settings = {"load_in_4bit", "device", "gradient_checkpointing", "layers"} & set(options)
    vlm = model.load_vlm(folder, **{name: options[name] for name in settings})
    vlm.cuda_graph = options.get("cuda_graph", False)
    if arm == "naive":
        repeat_prompt(vlm, point[2])
    timer = Timer(vlm.device)
    timer.wrap(sayo_mini, "encode_example", "sample")
    timer.wrap(vlm, "sample_groups", "sample")
    timer.wrap(vlm, "score_groups", "score", when=lambda kwargs: kwargs.get("reference"))
    timer.wrap(attention, "image_attention", "capture")
    step = make_step(vlm, *point)
    for _ in serve_steps(pipe, timer, vlm.core, PeakMemory(vlm.device)):
        step()


def make_step(vlm, P, C, G, image_tokens=None, completions_per_forward=0):
    """Returns: a function that runs one optimizer step, with one question of P tokens and G
    completions of C tokens."""
    vlm.completions_per_forward = completions_per_forward or vlm.completions_per_forward
    cfg = Config(
        num_generations=G,
        max_completion_length=C,
        instruction="",
        prompts_per_step=1,
        completions_per_forward=completions_per_forward,
        **LEARNING,
    )
    vlm.stop_ids = vlm.stop_ids[:0]  # no completion ends early
    params = [p for p in vlm.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=1e-5, weight_decay=0.0)
    generator = torch.Generator(vlm.device).manual_seed(0)
    example = make_question(vlm, P, image_tokens)

    def step():
        metrics, _ = sayo_mini.train_step(vlm, [example], cfg, optimizer, generator)
        assert metrics["frac_reward_zero_std"] == 0 and metrics["num_tokens"] == G * C

    return step


def repeat_prompt(vlm, G):
    """Imitate a trainer without a shared prompt: run the prompt and its image G times in every
    forward pass."""
    vlm.completions_per_forward, packed_forward = 1, vlm._packed_forward

    def forward(prompts, *args, **kwargs):
        for prompt in prompts:
            prompt.features = None  # the vision tower runs again
        return packed_forward(prompts, *args, **kwargs)

    def prefill(prompts, G):
        return shared_prefill([replace(prompts[0]) for _ in range(G)], 1)

    shared_prefill, vlm._packed_forward, vlm._prefill = vlm._prefill, forward, prefill


def run_trl(pipe, arm, folder, point, options):
    from datasets import Dataset  # here, because both are slow to import and take memory
    from trl import GRPOTrainer

    from sources.trl import TrlProcessor

    # Our loader determines the tokens, the image size and the data types.
    vlm = model.load_vlm(folder, options["load_in_4bit"], device=options["device"])
    example, device, dtype = make_question(vlm, point[0]), vlm.device, vlm.core.dtype
    processor = TrlProcessor(vlm.image_processor, vlm.tokenizer)
    quantization = vlm.core.config.quantization_config if options["load_in_4bit"] else None
    del vlm
    policy = load_policy(folder, device, dtype, quantization)
    chat = [{"role": "user", "content": example.question}]
    data = Dataset.from_list([{"prompt": chat, "image": example.image}] * 8)
    timer = Timer(device)

    class StepOnRequest(TrainerCallback):
        """Stops the trainer's own loop between its steps."""

        def on_train_begin(self, args, state, control, **kwargs):
            core = trainer.accelerator.unwrap_model(trainer.model).get_base_model()
            self.steps = serve_steps(pipe, timer, core, PeakMemory(device))
            next(self.steps)

        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = next(self.steps, "stop") == "stop"

    def constant_rewards(prompts, **kwargs):
        return [float(i % 2) for i in range(len(prompts))]

    trainer = GRPOTrainer(
        policy,
        constant_rewards,
        trl_config(point, options, device, dtype),
        data,
        processing_class=processor,
        callbacks=[StepOnRequest()],
        peft_config=LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules=LORA_TARGETS),
    )
    timer.wrap(trainer, "_generate", "sample")
    timer.wrap(trainer, "_generate_and_score_completions", "sample and score")
    trainer.train()


def load_policy(folder, device, dtype, quantization):
    """The transformers model that TRL trains."""
    policy = AutoModelForImageTextToText.from_pretrained(
        folder,
        dtype=dtype,
        quantization_config=quantization,
        attn_implementation="sdpa",
        device_map={"": device},
    )
    for module in policy.modules():  # see sources/pretrained.py
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return policy


def trl_config(point, options, device, dtype):
    from trl import GRPOConfig

    _, C, G = point
    return GRPOConfig(
        output_dir="trl",
        per_device_train_batch_size=G,
        num_generations=G,
        max_completion_length=C,
        max_steps=1000,
        gradient_checkpointing=options["gradient_checkpointing"],
        gradient_checkpointing_kwargs={"use_reentrant": False},
        use_cpu=device.type == "cpu",
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        report_to="none",
        save_strategy="no",
        logging_steps=10**6,
        disable_tqdm=True,
        top_k=0,
        generation_kwargs={"min_new_tokens": C},
        **LEARNING,
    )
