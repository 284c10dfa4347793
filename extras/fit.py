"""`fit`: will a run fit on a card? Predicts the peak memory of its phases from the model's
config.json alone, by running the program's own training step and evaluation on meta tensors."""

import io
from bisect import bisect_right
from contextlib import redirect_stderr
from dataclasses import replace
from functools import cache
from math import isqrt
from types import SimpleNamespace
from unittest.mock import patch

import bitsandbytes as bnb
import torch
from torch.nn import Linear
from transformers import AutoConfig, AutoModelForImageTextToText

from config import Config, InputError, build_config, model_path, parse_ints
from data import first
from evaluate import evaluate
from extras.meta_memory import META, MetaMemory, cuda_attention, tensor_with_values
from extras.shapes import PUBLISHED
from model import TOKENS_PER_FORWARD, Prompt, Vlm, add_lora, check_architecture, tile_grid
from scenes import Scenes

GB = 2**30
CARDS = (6, 8, 12, 16, 24)  # GB
CONTEXT = 0.75  # GB: the CUDA context, its libraries and their workspaces
FRAGMENTATION = 0.05  # of the peak: memory that PyTorch's allocator reserves but cannot use
PROMPT_TOKENS = 128  # the chat template, the instruction and a long question
DECODED = 3  # tokens of a completion; the caches have their final length from the first one
PHASES = {
    "loading": "the weights, loaded and quantized one matrix at a time",
    "sampling": "keys and values of all completions",
    "scoring": "the forward passes: rewards, reference",
    "update": "backward pass and optimizer",
    "evaluation": "answers to held-out questions and their attention maps",
}


def run_fit(given):
    """Print the memory that a run with these flags needs, and which cards it fits on.

    Args: given, a dict of flags, including `prompt_tokens`. Returns: the exit code.
    Raises: InputError.
    """
    given = {"model_name_or_path": Config.model_name_or_path} | given
    text_tokens = given.pop("prompt_tokens", PROMPT_TOKENS)
    if not 1 <= text_tokens <= 10**6:
        raise InputError(f"--prompt_tokens {text_tokens}: must be at least 1 and at most 1000000")
    cfg = build_config(given)
    # Meta tensors have no values for your own rewards.
    cfg = replace(cfg, reward="", reward_weights=Config.reward_weights)
    model_config = read_config(cfg.model_name_or_path, cfg.max_pixels)
    rows, cols = image_grid(model_config, cfg.max_pixels)
    print(
        f"{cfg.model_name_or_path} in {'NF4' if cfg.load_in_4bit else 'bf16'}, computed in bf16. "
        "Predicted, not measured; a display needs more.\n"
        f"{cfg.prompts_per_step} questions per step, {cfg.num_generations} completions of "
        f"{cfg.max_completion_length} tokens; prompts of {rows * cols} image tokens (--max_pixels) "
        f"and {text_tokens} others (--prompt_tokens)\n"
        "running one step and one evaluation without data; this takes about a minute ...",
        flush=True,
    )
    peaks = rehearse(model_config, cfg, text_tokens)
    for phase, what in PHASES.items():
        if phase in peaks:
            print(f"{phase:>12} {peaks[phase] / GB:6.2f} GB  {what}")

    @cache
    def needed(**changes):
        """The GB that a card needs with these flags changed. The evaluation does not change."""
        changed = replace(cfg, eval_examples=0, **changes)
        found = peaks | rehearse(model_config, changed, text_tokens) if changes else peaks
        return max(found.values()) / GB * (1 + FRAGMENTATION) + CONTEXT

    room = f"the largest + {FRAGMENTATION:.0%} for fragmentation + {CONTEXT} GB for CUDA"
    print(f"{'needed':>12} {needed():6.2f} GB  {room}")
    if cfg.load_in_4bit:
        size = dequantized_size(model_config) / GB
        print(f"{'optional':>12} {size:6.2f} GB  dequantized weights, while sampling, if they fit")
    if needed() > CARDS[0]:
        print("looking for flags with which it fits; each card takes a minute or more", flush=True)
    for card in CARDS:
        print(f"{card:>12} GB card: {verdict(card, cfg, needed)}", flush=True)
    return 0


def verdict(card, cfg, needed):
    """Whether a run fits on a card, or with which flag, as text.

    Args: card, in GB; needed, a function from changed flags to GB.
    """
    if needed() <= card:
        return "fits"
    G, found = cfg.num_generations, []
    smaller = {"completions_per_forward": range(1, min(cfg.completions_per_forward or G, G))}
    smaller["num_generations"] = range(2, G)
    for flag, values in smaller.items():
        count = bisect_right(values, card, key=lambda value: needed(**{flag: value}))
        if count:  # the first `count` values fit
            found.append(f"--{flag} {values[count - 1]}")
    if not found:
        return "does not fit, even with fewer completions; try a smaller --max_pixels or model"
    return f"fits with {' or '.join(found)}"


def dequantized_size(model_config):
    """Bytes of the language model's linear layers in 16 bits, see `decoding.room_for_weights`."""
    text = model_config.text_config
    D = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    heads = 2 * (text.num_attention_heads + text.num_key_value_heads)  # of q and o, of k and v
    layer = text.hidden_size * (D * heads + 3 * text.intermediate_size)
    return 2 * text.num_hidden_layers * layer


def read_config(name, max_pixels=None):
    """The transformers configuration of a hub model or a folder."""
    if name in PUBLISHED:
        config = PUBLISHED[name]()
    else:
        config = AutoConfig.from_pretrained(model_path(name), trust_remote_code=False)
    check_architecture(name, config, max_pixels)
    return config


def image_grid(model_config, max_pixels):
    """(rows, cols) of the image tokens of a large, square image."""
    if grid := tile_grid(model_config):
        return grid
    vision = model_config.vision_config
    cells = max(1, max_pixels // (vision.patch_size * vision.spatial_merge_size) ** 2)
    return isqrt(cells), cells // isqrt(cells)


def rehearse(model_config, cfg, text_tokens, dtype=torch.bfloat16):
    """Run a training step and one batch of the evaluation on meta tensors.

    Args: model_config, a transformers configuration; text_tokens, per prompt, in addition to an
    image of `max_pixels`. Returns: {phase: peak bytes}.
    """
    from sayo_mini import train_step  # here, because sayo_mini imports the commands

    settings = {"dtype": dtype, "attn_implementation": "sayo"}
    with META:
        model = AutoModelForImageTextToText.from_config(model_config, **settings)
    memory = MetaMemory()
    attention = patch.object(torch.nn.functional, "scaled_dot_product_attention", cuda_attention)
    tensor = patch.object(torch, "tensor", tensor_with_values)
    with memory, attention, tensor, redirect_stderr(io.StringIO()):  # no progress bar
        memory.enter("loading")
        vlm = RehearsedVlm(load_on_meta(model, cfg, memory), cfg, text_tokens, memory)
        memory.enter("update")
        params = [p for p in vlm.model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(params, foreach=True)  # the default on CUDA
        for p in params:
            p.grad = torch.zeros_like(p)
        optimizer.step()  # creates the optimizer's state, which exists in all steps but the first
        optimizer.zero_grad()
        example, scaler = Scenes("train", 1)[0], torch.amp.GradScaler("cpu", enabled=False)
        scaler.scale = vlm.begin_update
        train_step(vlm, [example] * cfg.prompts_per_step, cfg, optimizer, None, scaler)
        if cfg.eval_examples:
            memory.enter("evaluation")
            tokens = len(vlm.encode(None, "").input_ids) + cfg.max_completion_length
            batch = max(1, TOKENS_PER_FORWARD // tokens)
            # At least as many questions at once as are traced together; more only if memory allows.
            evaluate(vlm, first([example] * batch, cfg.eval_examples), cfg, "")
    return dict(memory.peaks)


def load_on_meta(model, cfg, memory):
    """Load a model as model.py does: tensor by tensor, with the language model's weights in NF4.
    Returns: the PEFT model."""
    # bitsandbytes caches this table on the device of its first use, which must not be meta.
    bnb.functional.name2qmap.setdefault("dynamic", bnb.functional.create_dynamic_map())
    nf4 = {"compute_dtype": model.dtype, "quant_type": "nf4", "device": META}
    for name, module in list(model.named_modules()):
        if cfg.load_in_4bit and type(module) is Linear and "language_model" in name:
            shape, has_bias = (module.in_features, module.out_features), module.bias is not None
            layer = bnb.nn.Linear4bit(*shape, has_bias, **nf4).to(model.dtype)
            layer.weight._quantize(META)  # both forms of the weight exist briefly
            model.set_submodule(name, layer)
        else:
            for tensor in [*module.parameters(recurse=False), *module.buffers(recurse=False)]:
                memory.count(tensor)
    model.is_loaded_in_4bit = cfg.load_in_4bit
    with META:
        return add_lora(model, cfg.lora_r, cfg.lora_alpha)


class RehearsedVlm(Vlm):
    """A Vlm without data. It looks at no image: every prompt has one of `max_pixels`."""

    def __init__(self, model, cfg, text_tokens, memory):
        tokenizer = SimpleNamespace(pad_token_id=0, eos_token_id=0, decode=lambda *_, **__: "")
        layers, heads = parse_ints(cfg.layers), parse_ints(cfg.heads)
        settings = cfg.completions_per_forward, cfg.gradient_checkpointing
        super().__init__(model, tokenizer, None, layers, heads, *settings)
        self.cfg, self.text_tokens, self.memory = cfg, text_tokens, memory
        self.grid = image_grid(self.core.config, cfg.max_pixels)
        self.stop_ids = torch.tensor([-1], device=META)  # no completion ends early

    def enter(self, phase):
        if self.memory.phase != "evaluation":  # which samples and scores as well
            self.memory.enter(phase)

    def encode(self, image, question):
        """A prompt with the image first. Where it is does not affect the memory."""
        vision, (rows, cols) = self.core.config.vision_config, self.grid
        where = torch.arange(rows * cols)
        ids = torch.zeros(len(where) + self.text_tokens, dtype=torch.long)
        ids[where] = self.core.config.image_token_id
        positions = torch.arange(len(ids))[None]
        if tile_grid(self.core.config):
            pixels = {"pixel_values": torch.zeros(1, vision.num_channels, *vision.image_size)}
        else:
            merge, positions = vision.spatial_merge_size, positions.expand(3, -1)
            size = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
            pixels = {"pixel_values": torch.zeros(len(where) * merge**2, size)}
            pixels["image_grid_thw"] = torch.tensor([[1, rows * merge, cols * merge]])
        image = dict(zip(pixels, self._move(*pixels.values())))
        ids, where, positions = self._move(ids, where, positions)
        return Prompt(ids, where, image, positions, self.grid)

    def _sample(self, prompts, G, max_tokens, *args):
        """Completions of full length, of which only the first tokens are decoded."""
        self.enter("sampling")
        groups = super()._sample(prompts, G, min(DECODED, max_tokens), *args)
        ids = torch.zeros(G, max_tokens, dtype=torch.long)
        mask = torch.ones(G, max_tokens, dtype=torch.bool)
        return [replace(group, ids=ids, mask=mask) for group in groups]

    def _decoder(self, prompt_caches, start, _):
        return super()._decoder(prompt_caches, start, self.cfg.max_completion_length)

    def score_groups(self, *args, **kwargs):
        self.enter("scoring")
        return super().score_groups(*args, **kwargs)

    def begin_update(self, loss):
        self.enter("update")
        return loss
