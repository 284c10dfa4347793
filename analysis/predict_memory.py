"""Predicts the peak memory of each phase of a run from the model's configuration alone, by running
the program's own training step and evaluation on meta tensors."""

import io
from contextlib import redirect_stderr, suppress
from dataclasses import replace
from math import isqrt

import bitsandbytes as bnb
import torch
from PIL import Image
from torch.nn import Linear
from transformers import AutoModelForImageTextToText

from analysis.evaluate import evaluate
from analysis.meta_memory import MetaMemory, meta_as_device
from config import parse_ints
from data import Example
from model import Prompt, Vlm
from sources.decoding import Decoder
from sources.pretrained import add_lora

META = torch.device("meta")
DECODED = 3  # tokens; other tokens cost the same, apart from the cache length
TRACED = 2  # answers shown in the report; the others cost the same
UNUSED = 10  # a token id without special meaning


class Tokens:
    """Stands in for the tokenizer, which is not loaded."""

    pad_token_id = eos_token_id = 0

    def decode(self, ids, **_):
        return ""


class LastTokens(Decoder):
    """Decodes as if `skipped` tokens had been decoded before."""

    skipped = 0

    def step(self, token, t):
        return super().step(token, t + self.skipped)


class RehearsedVlm(Vlm):
    """A Vlm without data. Its prompts have `text_tokens` and an image of `grid` = (rows, cols)."""

    def __init__(self, memory, text_tokens, grid, *args):
        super().__init__(*args)
        self.memory, self.text_tokens, self.grid = memory, text_tokens, grid
        self.in_evaluation, self.traced = False, 0
        self.stop_ids = torch.tensor([1], device=self.device)  # never sampled, see MetaMemory

    def enter(self, phase):
        if not self.in_evaluation:
            self.memory.enter(phase)

    def encode(self, image, question):
        """A prompt of the rehearsed length, with the image in the middle of the text."""
        config, vision = self.core.config, self.core.config.vision_config
        rows, cols = self.grid
        ids = torch.full((1, self.text_tokens + rows * cols), UNUSED)
        start = self.text_tokens // 2
        ids[0, start : start + rows * cols] = config.image_token_id
        ids[0, start - 1] = config.vision_start_token_id
        merge = vision.spatial_merge_size
        patches = torch.tensor([[1, rows * merge, cols * merge]])
        is_image = ids == config.image_token_id
        layout = {"mm_token_type_ids": is_image.int(), "image_grid_thw": patches}
        positions, _ = self.core.model.get_rope_index(ids, **layout)
        size = getattr(vision, "in_channels", 3) * vision.temporal_patch_size * vision.patch_size**2
        pixels = torch.zeros(patches.prod().item(), size)
        tensors = ids[0], is_image[0].nonzero()[:, 0], pixels, patches, positions[:, 0]
        return Prompt(*(tensor.to(self.device) for tensor in tensors), grid=(rows, cols))

    def sample_groups(self, prompts, num_generations, max_tokens, *args, **kwargs):
        """Decode only the last tokens of full-length completions, with a cache of full length."""
        self.enter("sampling")
        self.skipped = max(0, max_tokens - DECODED)
        tokens = max_tokens - self.skipped
        completions = super().sample_groups(prompts, num_generations, tokens, *args, **kwargs)
        shape = num_generations, max_tokens
        ids = torch.zeros(shape, dtype=torch.long, device=self.device)
        mask = torch.ones(shape, dtype=torch.bool, device=self.device)
        return [replace(c, ids=ids, mask=mask) for c in completions]

    def _decoder(self, prompt_caches, start, max_tokens):
        decoder = LastTokens(self.core, prompt_caches, start, max_tokens + self.skipped)
        decoder.skipped = self.skipped
        return decoder

    def score_groups(self, prompts, completions, attention=True, reference=False):
        training = torch.is_grad_enabled() and not attention
        self.enter("update" if training else "scoring")
        return super().score_groups(prompts, completions, attention, reference)

    def _packed_forward(self, prompts, ids, capture=None, **kwargs):
        if self.in_evaluation and capture and not capture.average_heads:  # maps for the report
            self.traced += 1
            if self.traced > TRACED:
                raise Enough
        return super()._packed_forward(prompts, ids, capture, **kwargs)


class Enough(Exception):
    """Raised when the rest of an evaluation would only repeat what was rehearsed."""


class UpdatePhase(torch.amp.GradScaler):
    """A loss scaler that only marks the beginning of a backward pass."""

    def __init__(self, memory):
        super().__init__("cpu", enabled=False)
        self.memory = memory

    def scale(self, loss):
        self.memory.enter("update")
        return loss


def build_on_meta(config, dtype):
    """The transformers model of a configuration, without data."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with META:
            model = AutoModelForImageTextToText.from_config(config, attn_implementation="sayo")
    finally:
        torch.set_default_dtype(default)
    model.tie_weights()
    return model


def load_on_meta(model, cfg, memory):
    """Load a model like sources.pretrained: tensor by tensor, quantizing the language model's
    weights one at a time. Returns: the PEFT model."""
    # bitsandbytes caches this table on the device of its first use, which must not be meta.
    bnb.functional.name2qmap.setdefault("dynamic", bnb.functional.create_dynamic_map())
    dtype = model.lm_head.weight.dtype
    for name, module in list(model.named_modules()):
        if cfg.load_in_4bit and type(module) is Linear and "language_model" in name:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, quantized(module, dtype))
        else:
            own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
            for tensor in own:
                memory.track(tensor)
    model.is_loaded_in_4bit = cfg.load_in_4bit
    with META:
        return add_lora(model, cfg.lora_r, cfg.lora_alpha)


def quantized(linear, dtype):
    """A linear layer in NF4 with double quantization. Both forms of the weight exist briefly."""
    shape, bias = (linear.in_features, linear.out_features), linear.bias
    settings = {"compress_statistics": True, "quant_type": "nf4"}
    layer = bnb.nn.Linear4bit(*shape, bias=False, compute_dtype=dtype, device=META, **settings)
    weight = torch.empty_like(linear.weight)
    weight = bnb.nn.Params4bit(weight, requires_grad=False, **settings)
    layer.weight = weight._quantize(META)
    layer.bias = None if bias is None else torch.nn.Parameter(torch.empty_like(bias))
    layer.compute_type_is_set = True
    return layer


def image_grid(config, max_pixels):
    """(rows, cols) of the image tokens of a large, square image."""
    cell = config.vision_config.patch_size * config.vision_config.spatial_merge_size
    cells = max(1, max_pixels // cell**2)
    return isqrt(cells), cells // isqrt(cells)


def rehearse(config, cfg, train_step, text_tokens, dtype=torch.bfloat16, kernels="cuda", grid=None):
    """Run a training step and one batch of the evaluation.

    Args: config, a transformers configuration; train_step, the function in sayo_mini; text_tokens,
    per prompt, in addition to an image of `max_pixels` or of `grid` = (rows, cols); kernels, "cuda"
    or "cpu". Returns: {phase: peak bytes}, including "loaded", the bytes in use after loading.
    """
    memory, peaks, model = MetaMemory(), {}, build_on_meta(config, dtype)
    with memory, meta_as_device(kernels):
        memory.enter("loading")
        vlm = rehearsed_vlm(model, cfg, memory, text_tokens, grid)
        peaks["loaded"] = memory.current
        params = [p for p in vlm.model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(params, lr=1e-5, foreach=kernels == "cuda")
        if kernels == "cuda":
            memory.enter("update")
            make_moments(optimizer, params)
        examples = [rehearsed_example(vlm)] * max(cfg.prompts_per_step, cfg.eval_examples)
        step = vlm, examples[: cfg.prompts_per_step], cfg, optimizer, None
        train_step(*step, scaler=UpdatePhase(memory))
        if cfg.eval_examples and kernels == "cuda":
            vlm.in_evaluation = True
            memory.enter("evaluation")
            with redirect_stderr(io.StringIO()), suppress(Enough):  # no progress bar
                evaluate(vlm, examples[: cfg.eval_examples], cfg, "")
    return memory.peaks | peaks


def rehearsed_vlm(model, cfg, memory, text_tokens, grid):
    grid = grid or image_grid(model.config, cfg.max_pixels)
    settings = parse_ints(cfg.layers), parse_ints(cfg.heads)
    settings += cfg.completions_per_forward, cfg.gradient_checkpointing
    model = load_on_meta(model, cfg, memory)
    return RehearsedVlm(memory, text_tokens, grid, model, Tokens(), None, *settings)


def make_moments(optimizer, params):
    """Create AdamW's state, which exists in every step except the first."""
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    optimizer.zero_grad()


def rehearsed_example(vlm):
    rows, cols = vlm.grid
    return Example(
        Image.new("L", (cols, rows)), "", "", [(0, 0, max(1, cols // 2), 1)], "rehearsed"
    )
