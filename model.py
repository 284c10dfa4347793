"""One vision-language model: load it, lay out a prompt, sample a group and score a group.

The prompt and its image run once per group, not once per completion: sampling decodes G completions
next to one cached prompt, scoring packs all into one sequence. attention.py makes both possible.
"""

import inspect
import json
import logging
import math
import os
import shutil
import warnings
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from types import SimpleNamespace

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch.nn.functional import pad
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageTextToText,
    AutoTokenizer,
    BitsAndBytesConfig,
    Qwen2_5_VLForConditionalGeneration,
)
from transformers.utils import cached_file
from transformers.utils.logging import disable_progress_bar

from attention import Capture, PackedGroup, PromptCache
from config import InputError, model_path, parse_ints
from decoding import Decoder, GraphDecoder, normalize

SUPPORTED = ("qwen2_5_vl", "qwen3_vl", "internvl")
LANGUAGE_MODELS = ("qwen2_5_vl_text", "qwen3_vl_text", "qwen2", "qwen3")  # plain attention
LORA_TARGETS = r".*language_model\.layers.*\.(q|k|v|o|gate|up|down)_proj"
# Settings of a saved adapter that may differ from PEFT's defaults: others are refused. The names
# and shapes of its weights are compared when it is loaded.
ANY_VALUE = """r lora_alpha lora_dropout target_modules exclude_modules modules_to_save task_type
layers_to_transform layers_pattern base_model_name_or_path revision auto_mapping peft_version
inference_mode""".split()
TOKENS_PER_FORWARD = 2**12  # when prompts are prefilled or answers evaluated together
SAMPLED_AT_ONCE = 64  # completions decoded together; up to about 64, one more costs little time
LOGITS_PER_CHUNK = 2**24  # floats, 64 MiB: the logits of about 110 tokens with Qwen's vocabulary
CHECK_DONE = {"cuda": 8}  # tokens between checks whether all have ended; a check waits for the GPU

# With fp16 as the compute type the vision tower stays in fp32, because it overflows in fp16.
Qwen2_5_VLForConditionalGeneration._keep_in_fp32_modules = ["visual"]
# PEFT 0.21 uses a deprecated name of transformers 5.24.
warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
# bitsandbytes warns about a kernel that is not used here.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
# transformers prints a table of missing tensors; `load_pretrained` reports them in one line.
logging.getLogger("transformers.modeling_utils").addFilter(
    lambda record: "LOAD REPORT" not in record.getMessage()
)


# --- loading: a frozen model in 4 bits, with LoRA ---


def load_model(cfg):
    """The model that a Config describes, with its adapter if there is one."""
    vlm = load_vlm(
        cfg.model_name_or_path,
        load_in_4bit=cfg.load_in_4bit,
        lora_r=cfg.lora_r,
        lora_alpha=cfg.lora_alpha,
        device=cfg.device,
        max_pixels=cfg.max_pixels,
        gradient_checkpointing=cfg.gradient_checkpointing,
        completions_per_forward=cfg.completions_per_forward,
        layers=parse_ints(cfg.layers),
        heads=parse_ints(cfg.heads),
    )
    vlm.cuda_graph = cfg.cuda_graph
    if cfg.adapter:
        vlm.load_adapter(cfg.adapter)
        saved = json.loads(Path(cfg.adapter, "adapter_config.json").read_text("utf-8"))
        base = saved["base_model_name_or_path"] or ""
        if Path(base).name != Path(cfg.model_name_or_path).name:
            print(f"note: {cfg.adapter} was trained on {base}, not on {cfg.model_name_or_path}")
    return vlm


def load_vlm(
    name_or_path,
    load_in_4bit=True,
    lora_r=16,
    lora_alpha=32,
    device=None,
    max_pixels=None,
    gradient_checkpointing=False,
    completions_per_forward=0,
    layers=(-1,),
    heads=None,
    dtype=None,
):
    """Load a Qwen2.5-VL, Qwen3-VL or InternVL3.5 from the hub or a folder, frozen except for LoRA
    on the language model's linear layers, which are quantized to 4 bits by default.

    Args: device, by default CUDA if available; max_pixels, images are scaled down to this area,
    except by InternVL, whose tile has a fixed size; completions_per_forward, 0 for a whole group;
    layers and heads whose attention `score` averages, None for all; dtype, from `choose_device`.
    Returns: Vlm. Raises: InputError.
    """
    device, dtype = choose_device(device, dtype)
    name = model_path(str(name_or_path))
    model, tokenizer, processor = load_pretrained(name, load_in_4bit, device, dtype, max_pixels)
    if tile_grid(model.config):
        processor.crop_to_patches = False  # one tile per image, as in the paper's code
    elif max_pixels:
        least = min(processor.size["shortest_edge"], max_pixels // 2)  # it has to be smaller
        processor.size = {"shortest_edge": least, "longest_edge": max_pixels}
    if model.num_parameters() < 1e7:
        torch.set_num_threads(min(2, torch.get_num_threads()))  # more threads do not help
    model = add_lora(model, lora_r, lora_alpha)
    settings = layers, heads, completions_per_forward, gradient_checkpointing
    return Vlm(model, tokenizer, processor, *settings)


def choose_device(device=None, dtype=None):
    """The device for a name, None or "auto", and its compute type.

    Args: dtype, by default bf16 on a card that supports it, fp16 on other cards, fp32 on a CPU.
    Returns: (torch.device, torch.dtype). Raises: InputError if CUDA cannot be used.
    """
    cuda = torch.cuda.is_available()
    if device in (None, "auto"):
        # A card that PyTorch cannot use is an error, unless an empty CUDA_VISIBLE_DEVICES hides it.
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
        device = "cuda" if cuda or shutil.which("nvidia-smi") and not hidden else "cpu"
    device = torch.device(device)
    if device.type == "cpu":
        return device, dtype or torch.float32
    if not cuda:
        version = f"PyTorch {torch.__version__}, CUDA {torch.version.cuda}"
        page = "https://pytorch.org/get-started/locally/"
        advice = f"install the build for your driver and card from {page}, or use --device cpu"
        raise InputError(f"CUDA is not available ({version}): {advice}")
    # Before compute capability 8.0, bf16 is emulated and slow.
    bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    return device, dtype or (torch.bfloat16 if bf16 else torch.float16)


def load_pretrained(name, load_in_4bit, device, dtype, max_pixels=None):
    """Returns: the transformers model, its tokenizer and its image processor. With `load_in_4bit`
    the language model is quantized to NF4, but not its embeddings and output head."""
    disable_progress_bar()
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=[".*visual", ".*vision_tower", ".*projector", "lm_head"],
    )
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
        check_architecture(name, config, max_pixels)
        check_weights(name)
        tokenizer = load_tokenizer(name, config)
        processor = AutoImageProcessor.from_pretrained(name, backend="pil", trust_remote_code=False)
        model, report = AutoModelForImageTextToText.from_pretrained(
            name,
            dtype=dtype,
            quantization_config=quantization if load_in_4bit else None,
            use_safetensors=True,  # never a pickle
            trust_remote_code=False,  # transformers would offer to run code from the folder
            attn_implementation="sayo",
            device_map={"": device},
            output_loading_info=True,
        )
    except (InputError, torch.OutOfMemoryError, torch.AcceleratorError):
        raise
    except Exception as error:  # a damaged file can raise anything
        advice = "check the name and the network, or download it again"
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"cannot load {name}: {advice} ({reason})") from None
    if missing := sorted(report["missing_keys"]):  # transformers would leave them random
        count = f"{len(missing)} tensors, including {missing[0]}"
        raise InputError(f"the weights in {name} lack {count}: download it again")
    for module in model.modules():
        # On some CPUs bitsandbytes repacks frozen weights in bf16 when they are first used without
        # gradient. Sampling and training would then use different weights.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model, tokenizer, processor


def check_architecture(name, config, max_pixels=None):
    """Raises: InputError for a model of another type, or one that is already quantized, or if
    images would have to be smaller than InternVL's tile."""
    kinds = config.model_type, config.get_text_config().model_type
    for kind, supported in zip(kinds, (SUPPORTED, LANGUAGE_MODELS)):
        if kind not in supported:
            raise InputError(f"{name} has type {kind}; supported: {', '.join(supported)}")
    tile = math.prod(config.vision_config.image_size) if tile_grid(config) else 0
    if max_pixels and max_pixels < tile:
        raise InputError(f"--max_pixels {max_pixels}: {name} always uses {tile}; leave it out")
    if any(getattr(config, key, None) for key in ("quantization_config", "compression_config")):
        advice = "use the original checkpoint, which --load_in_4bit quantizes"
        raise InputError(f"{name} is already quantized: {advice}")


def check_weights(name):
    """Raises: InputError if the list of weights names a pickle, which transformers would load."""
    index = "model.safetensors.index.json"
    path = cached_file(name, index, _raise_exceptions_for_missing_entries=False)
    files = json.loads(Path(path).read_text("utf-8"))["weight_map"].values() if path else ()
    if wrong := [file for file in files if not file.endswith(".safetensors")]:
        raise InputError(f"{name}: {index} names {wrong[0]}: only .safetensors are loaded")


def load_tokenizer(name, config):
    """The tokenizer with its chat template. Raises: InputError."""
    tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    if tokenizer.chat_template is None:  # some checkpoints store it where only processors look
        path = cached_file(name, "chat_template.json", _raise_exceptions_for_missing_entries=False)
        if path is None:
            raise InputError(f"{name} has no chat template: use an Instruct model")
        tokenizer.chat_template = json.loads(Path(path).read_text("utf-8"))["chat_template"]
    if not tokenizer.convert_ids_to_tokens(config.image_token_id):
        raise InputError(f"{name} has no tokenizer, or another model's: download it again")
    if tile_grid(config):  # InternVL's processor would write a token before and one after the image
        placeholder = tokenizer.convert_ids_to_tokens(config.image_token_id)
        template = tokenizer.chat_template.replace("<image>", placeholder)  # in older checkpoints
        marked = f"{tokenizer.start_image_token}{placeholder}{tokenizer.end_image_token}"
        tokenizer.chat_template = template.replace(placeholder, marked)
    return tokenizer


def tile_grid(config):
    """(rows, cols) of the image tokens of InternVL, which squeezes every image to one square tile;
    None for Qwen, where the grid depends on the image."""
    if config.model_type != "internvl":
        return None
    sides = zip(config.vision_config.image_size, config.vision_config.patch_size)
    return tuple(int(side // patch * config.downsample_ratio) for side, patch in sides)


def add_lora(model, r, alpha):
    """The PEFT model: LoRA in fp32, without dropout, on the language model's linear layers.
    Everything else is frozen."""
    model.requires_grad_(False)
    model = get_peft_model(model, LoraConfig(r=r, lora_alpha=alpha, target_modules=LORA_TARGETS))
    for module in model.modules():
        if hasattr(module, "lora_A"):
            module.forward = partial(lora_forward, module)
        elif hasattr(module, "variance_epsilon"):  # RMSNorm: one operation instead of six
            module.forward = partial(normalize, norm=module)
    return model


def lora_forward(layer, x):
    """PEFT's forward without its copies of x and of the outputs in fp32: with 16-bit types they
    would be most of the memory traffic. The adapter's weights stay in fp32, as under autocast."""
    out = layer.base_layer(x)
    for name in () if layer.disable_adapters else layer.active_adapters:
        A, B = (weights[name].weight.to(x.dtype) for weights in (layer.lora_A, layer.lora_B))
        low = x.flatten(0, -2) @ A.T  # (rows, r)
        out = torch.addmm(out.flatten(0, -2), low, B.T, alpha=layer.scaling[name]).view_as(out)
    return out


def adapter_settings(folder, given):
    """A saved adapter's settings, a dict of lora_r and lora_alpha. Raises: InputError if it cannot
    be read, or if `given`, a dict of flags, contradicts it."""
    path = Path(folder) / "adapter_config.json"
    try:
        saved, plain = json.loads(path.read_text("utf-8")), LoraConfig().to_dict()
        # A variant, also one that PEFT will add, has a setting of its own. "gaussian" is how the
        # weights were initialized, which no longer matters.
        for name, value in saved.items():
            if value and name not in ANY_VALUE and value not in (plain.get(name), "gaussian"):
                problem = f"{path} has {name} {str(value)[:40]}"
                raise InputError(f"{problem}: only plain LoRA can be loaded")
        settings = {"lora_r": int(saved["r"]), "lora_alpha": int(saved["lora_alpha"])}
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"no adapter in {folder}: cannot read {path.name} ({error!r})") from None
    for name, value in settings.items():
        if given.get(name, value) != value:
            problem = f"--{name} {given[name]}: the adapter in {folder} has {value}"
            raise InputError(f"{problem}; leave the flag out")
    return settings


def resolve_indices(what, indices, count):
    """Sorted, non-negative indices; all `count` if `indices` is None. Raises: InputError."""
    indices = indices or range(count)
    if wrong := [i for i in indices if not -count <= i < count]:
        raise InputError(f"no {what} {wrong[0]}: choose from 0 to {count - 1}, or -1 for the last")
    return sorted({i % count for i in indices})


# --- a question as a prompt, a group as completions and scores ---


@dataclass
class Prompt:
    """A question about an image, as tokens."""

    input_ids: torch.Tensor  # (P,)
    image_positions: torch.Tensor  # (N,) positions of the image tokens in the prompt
    image: dict  # what the vision tower gets: pixel_values and, for Qwen, image_grid_thw (1, 3)
    position_ids: torch.Tensor  # (3, P): time, height, width (M-RoPE), or (1, P) for InternVL
    grid: tuple[int, int]  # (rows, cols) of image tokens, rows * cols = N
    features: list = None  # of the vision tower, once computed: (N, D), then deepstack's levels


@dataclass
class Completions:
    """G completions of one prompt, on the CPU. `mask` is true on real tokens, up to and including
    the end of turn. A completion that was cut off at `max_tokens` has none, and is trained on like
    any other. The mask does not compare ids with the padding id, because a model may write it."""

    ids: torch.Tensor  # (G, C), padded on the right
    mask: torch.Tensor  # (G, C) bool
    texts: list[str] = ()
    temperature: float = 1.0  # used for scoring
    finished: torch.Tensor = None  # (G,) bool: ended with a stop token

    def __getitem__(self, rows: slice):
        return Completions(self.ids[rows], self.mask[rows], self.texts[rows], self.temperature)


@dataclass
class Scores:
    """What `score` returns, on the CPU, so that the many small operations on it never wait for the
    GPU. Only `logps` carries gradient, outside `no_grad`. Values at padding are undefined."""

    logps: torch.Tensor  # (G, C) log p of each token
    entropy: torch.Tensor  # (G, C) nats, of the distribution each token was drawn from
    attention: torch.Tensor | None = None  # (G, C, N), row j has token j as its query
    prompt_attention: torch.Tensor | None = None  # (N,), the row of the prompt's last token


class Vlm:
    """A vision-language model with LoRA; created by `load_vlm`. `.model` is the PEFT model."""

    cuda_graph = False  # decode with `GraphDecoder`
    cached_tokens = math.inf  # while sampling; set when memory runs out

    def __init__(self, model, tokenizer, processor, layers, heads, per_forward, checkpointing):
        self.model, self.tokenizer, self.image_processor = model, tokenizer, processor
        self.core = model.get_base_model()  # the transformers model under PEFT, LoRA in place
        self.device = self.core.device
        self.core.model.language_model._deepstack_process = add_features  # never waits for the GPU
        self.dtype = self.core.lm_head.weight.dtype  # 4-bit weights do not show it
        # transformers 5.24 renames past_key_values, the argument and the output, to cache.
        known = inspect.signature(type(self.core.model).forward).parameters
        self.cache_name = "cache" if "cache" in known else "past_key_values"
        self.completions_per_forward, self.gradient_checkpointing = per_forward, checkpointing
        config, text = self.core.config, self.core.config.text_config
        self.layers = resolve_indices("layer", layers, text.num_hidden_layers)
        self.heads = resolve_indices("head", heads, text.num_attention_heads)
        if checkpointing:
            self.core.activation_checkpointing_enable({"use_reentrant": False})
        # Image placeholders are not text: they are neither sampled nor scored.
        names = "image video vision_start vision_end start_image end_image".split()
        ids = {getattr(x, f"{n}_token_id", None) for x in (config, tokenizer) for n in names}
        self.placeholders = torch.tensor(sorted(ids - {None}), device=self.device)
        stop = self.core.generation_config.eos_token_id
        stop = tokenizer.eos_token_id if stop is None else stop
        stop = stop if isinstance(stop, list) else [stop]
        self.stop_ids = torch.tensor(stop, device=self.device)
        self.pad_id = stop[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id

    def load_adapter(self, folder):
        """Load a saved adapter. Raises: InputError if it does not fit; nothing is changed then."""
        lora = self.model.peft_config[self.model.active_adapter]
        adapter_settings(folder, {"lora_r": lora.r, "lora_alpha": lora.lora_alpha})
        try:
            weights = load_file(Path(folder) / "adapter_model.safetensors")
        except (OSError, SafetensorError) as error:
            raise InputError(f"no adapter in {folder}: {error}") from None
        expected = {name: p.shape for name, p in get_peft_model_state_dict(self.model).items()}
        if wrong := expected.items() ^ {name: p.shape for name, p in weights.items()}.items():
            raise InputError(f"the adapter in {folder} does not fit this model: {min(wrong)[0]}")
        set_peft_model_state_dict(self.model, weights)

    def encode(self, image, question):
        """Lay out an image and a question by the model's chat template.

        The template's one image placeholder is repeated N times, N = rows * cols of the grid, so
        that every image token has a place. Prompts are never truncated.
        Returns: Prompt. Raises: InputError if the question contains an image placeholder.
        """
        pixels = self.image_processor(images=[image.convert("RGB")], return_tensors="pt")
        pixels.pop("num_patches", None)  # InternVL's tiles: one
        grid, patches = tile_grid(self.core.config), pixels.get("image_grid_thw")
        if not grid:
            grid = tuple((patches[0, 1:] // self.image_processor.merge_size).tolist())
        content = [{"type": "image"}, {"type": "text", "text": question}]
        chat = [{"role": "user", "content": content}]
        text = self.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        image_id = self.core.config.image_token_id
        placeholder = self.tokenizer.convert_ids_to_tokens(image_id)
        if text.count(placeholder) != 1:
            raise InputError(f"the question may not contain {placeholder}: {question!r}")
        text = text.replace(placeholder, placeholder * math.prod(grid))
        ids = self.tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
        is_image = ids == image_id  # (1, P)
        positions = torch.arange(ids.shape[1])[None]
        if patches is not None:  # M-RoPE
            layout = {"mm_token_type_ids": is_image.int(), "image_grid_thw": patches}
            positions = self.core.model.get_rope_index(ids, **layout)[0][:, 0]  # (3, P)
        where = is_image[0].nonzero()[:, 0]  # (N,)
        image = dict(zip(pixels, self._move(*pixels.values())))
        ids, where, positions = self._move(ids[0], where, positions)
        return Prompt(ids, where, image, positions, grid)

    def _move(self, *tensors):
        """Copies on the model's device. The CPU does not wait until they have arrived."""
        return [tensor.to(self.device, non_blocking=True) for tensor in tensors]

    def sample(self, prompt, num_generations, max_tokens, temperature=1.0, generator=None):
        """The Completions of one prompt, see `sample_groups`."""
        return self.sample_groups([prompt], num_generations, max_tokens, temperature, generator)[0]

    @torch.no_grad()
    def sample_groups(self, prompts, num_generations, max_tokens, temperature=1.0, generator=None):
        """`num_generations` completions of up to `max_tokens` tokens for each of B prompts, without
        top-p, so that sampling and scoring use one distribution. Temperature 0 is greedy.
        Returns: B Completions, to be scored at the same temperature (greedy ones at 1)."""
        groups, settings = [], (num_generations, max_tokens, temperature, generator)

        def cached(prompt):
            return len(prompt.input_ids) + num_generations * max_tokens

        while prompts:
            most = prompts[: max(1, SAMPLED_AT_ONCE // num_generations)]
            batch = next(split_by_tokens(most, cached, self.cached_tokens))
            try:
                groups += self._sample(batch, *settings)
            except torch.OutOfMemoryError:
                if len(batch) == 1:
                    raise
                self.cached_tokens = sum(map(cached, batch)) // 2
                tqdm.write(f"out of GPU memory: sampling fewer than {len(batch)} questions at once")
            else:
                prompts = prompts[len(batch) :]
        return groups

    def _sample(self, prompts, G, max_tokens, temperature, generator):
        check_every = CHECK_DONE.get(self.device.type, 1)
        hidden, prompt_caches, start = self._prefill(prompts, G)
        decoder, ids, live = self._decoder(prompt_caches, start, max_tokens), [], []
        done = torch.zeros(len(hidden), dtype=torch.bool, device=self.device)  # (B*G,)
        for step in range(max_tokens):
            logits = self._logits(hidden, temperature or 1.0)  # (B*G, V)
            if temperature == 0:
                token = logits.argmax(-1)
            else:
                # p.multinomial(1) draws from p as well, but waits for the GPU and fails on NaN.
                p = logits.softmax(-1)
                token = (p / torch.empty_like(p).exponential_(generator=generator)).argmax(-1)
            ids.append(token.masked_fill(done, self.pad_id))
            live.append(~done)
            done = done | torch.isin(token, self.stop_ids)
            if step + 1 == max_tokens or (step % check_every == 0 and done.all()):
                break
            hidden = decoder.step(ids[-1], step)
        rows, C = torch.stack([*ids, *live, done], 1).cpu(), len(ids)  # one transfer for all
        ids, mask, done = rows.split([C, C, 1], 1)  # (B*G, C), (B*G, C), (B*G, 1)
        groups = zip(ids.split(G), mask.bool().split(G), done[:, 0].bool().split(G))
        return [self._completions(*group, temperature or 1.0) for group in groups]

    def _prefill(self, prompts, G):
        """Run every prompt once. Returns: the hidden states (B*G, D) that predict the first tokens,
        the prompts' caches, and the positions (B*G,) of the first tokens."""
        hidden, caches, nothing = [], [], torch.empty(0, 0, dtype=torch.long, device=self.device)
        for batch in split_by_tokens(prompts, lambda prompt: len(prompt.input_ids)):
            states, cache = self._packed_forward(batch, [nothing] * len(batch), use_cache=True)
            lengths = [len(p.input_ids) for p in batch]
            caches.append((cache, lengths))
            hidden += [h[-1].expand(G, -1) for h in states.split(lengths)]
        # With M-RoPE an image takes up fewer positions than tokens.
        start = torch.stack([p.position_ids.max() + 1 for p in prompts]).repeat_interleave(G)
        return torch.cat(hidden), stack_prompts(caches), start

    def _decoder(self, *args):
        return (GraphDecoder if self.cuda_graph else Decoder)(self.core, *args)

    def _completions(self, ids, mask, done, temperature):
        longest = mask.sum(1).max().item()  # other groups may be longer
        ids, mask = ids[:, :longest], mask[:, :longest]  # (G, C)
        decode = self.tokenizer.decode
        texts = [decode(row[real], skip_special_tokens=True) for row, real in zip(ids, mask)]
        return Completions(ids, mask, texts, temperature, done)

    def score(self, prompt, completions, attention=True, reference=False):
        """The Scores of one group, see `score_groups`."""
        return self.score_groups([prompt], [completions], attention, reference)[0]

    def score_groups(self, prompts, completions, attention=True, reference=False):
        """Log-probability, entropy and attention to the image of every token of some groups, in one
        packed forward; group by group in parts if `completions_per_forward` is less than G.

        Args: reference, switch the adapter off: the model that the KL refers to. Only for use in
        `no_grad`, because a recomputation would have the adapter on.
        Returns: a list of Scores; the attention is the mean over this Vlm's layers and heads.
        """
        with self.model.disable_adapter() if reference else nullcontext():
            if 0 < self.completions_per_forward < max(len(c.ids) for c in completions):
                groups = zip(prompts, completions)
                return [self._score_in_parts(*group, attention) for group in groups]
            return self._score(prompts, completions, attention)

    def _score_in_parts(self, prompt, completions, attention):
        """The Scores of one group, a few completions at a time. The backward pass computes each
        part again, so that only one part's activations are in memory."""

        def score_part(start):
            rows = completions[start : start + self.completions_per_forward]
            (part,) = self._score([prompt], [rows], attention)
            return part.logps, part.entropy, part.attention, part.prompt_attention

        starts = range(0, len(completions.ids), self.completions_per_forward)
        parts = [checkpoint(score_part, start, use_reentrant=False) for start in starts]
        logps, entropy, maps, prompt_maps = zip(*parts)
        maps = torch.cat(maps) if attention else None
        return Scores(torch.cat(logps), torch.cat(entropy), maps, prompt_maps[0])

    def _score(self, prompts, completions, attention):
        capture = Capture(self.layers, self.heads) if attention else None
        (temperature,) = {c.temperature for c in completions}  # one for all groups
        ids, predictors = self._move(*(c.ids for c in completions)), []
        hidden, _ = self._packed_forward(prompts, ids, capture)
        lengths = [len(p.input_ids) + x.numel() for p, x in zip(prompts, ids)]
        for prompt, x, h in zip(prompts, ids, hidden.split(lengths)):
            P = len(prompt.input_ids)
            # The prompt's last token predicts the first one; each token predicts its successor.
            first, rest = h[P - 1].expand(len(x), 1, -1), h[P:].view(*x.shape, -1)[:, :-1]
            predictors.append(torch.cat([first, rest], 1).flatten(0, 1))  # (G*C, D)
        targets = torch.cat([x.flatten() for x in ids])
        logps, entropy = self._token_scores(torch.cat(predictors), targets, temperature)
        logps, entropy = torch.stack([logps, entropy]).cpu()  # one wait for both
        sizes, scores, entropy = [x.numel() for x in ids], [], entropy.detach()
        groups = zip(ids, logps.split(sizes), entropy.split(sizes))
        for number, (x, group_logps, group_entropy) in enumerate(groups):
            group = Scores(group_logps.view_as(x), group_entropy.view_as(x))
            if attention:
                maps = sum(layer[number] for layer in capture.maps.values()) / len(self.layers)
                maps = maps.cpu()
                group.prompt_attention = maps[0]
                group.attention = maps[1:].view(*x.shape, -1)  # (G, C, N)
            scores.append(group)
        return scores

    def _packed_forward(self, prompts, ids, capture=None, use_cache=False):
        """Run `[prompt | c_1 | ... | c_G]` of several groups as one sequence. Args: ids (G, C) of
        every group. Returns: hidden states (S, D) of the last layer, and the cache."""
        # transformers checkpoints only in train mode, and caches only outside it.
        self.model.train(self.gradient_checkpointing and torch.is_grad_enabled())
        tokens, positions, packed = [], [], []
        for prompt, (G, C), completions in zip(prompts, (x.shape for x in ids), ids):
            P, start = len(prompt.input_ids), prompt.position_ids.max() + 1  # of every completion
            after = start + torch.arange(C, device=self.device)
            after = after.repeat(len(prompt.position_ids), G)
            tokens += [prompt.input_ids, completions.flatten()]
            positions += [prompt.position_ids, after]
            # A completion sees the prompt and its own past.
            mask = torch.ones(1, 1, C, P + C, dtype=torch.bool, device=self.device).tril(P)
            packed.append(PackedGroup(P, G, C, prompt.image_positions, mask))
        positions = torch.cat(positions, 1)  # (3, S), or (1, S) without M-RoPE
        out = self.core.model(
            input_ids=torch.cat(tokens)[None],
            position_ids=positions[:, None] if len(positions) == 3 else positions,
            attention_mask=packed[0].mask,  # not used: keeps transformers from building a large one
            mm_encoder_outputs={"image": image_features(self.core.model, prompts)},
            use_cache=use_cache,
            packed=packed,  # transformers passes these two on to every layer's `sayo_attention`
            capture=capture,
        )
        return out.last_hidden_state[0], getattr(out, self.cache_name)

    def _logits(self, hidden, temperature):
        """fp32 logits (R, V) of the distribution that is sampled and scored, of states (R, D)."""
        logits = self.core.lm_head(hidden).float().div_(temperature)
        return logits.index_fill_(1, self.placeholders, -torch.inf)

    def _token_scores(self, hidden, targets, temperature):
        """log p of `targets` (R,) and the entropy (R,), of states (R, D), in chunks of rows: the
        logits of a chunk are recomputed for the gradient, so (R, V) is never materialized."""

        def chunk(hidden, targets):
            logps = self._logits(hidden, temperature).log_softmax(-1)  # (rows, V)
            # The entropy comes last: it has no gradient, so recomputation can stop before it.
            chosen = logps.gather(-1, targets[:, None])[:, 0]
            return chosen, torch.special.entr(logps.detach().exp()).sum(-1)

        rows = max(1, LOGITS_PER_CHUNK // self.core.config.text_config.vocab_size)
        chunks = zip(hidden.split(rows), targets.split(rows))
        parts = [checkpoint(chunk, h, t, use_reentrant=False) for h, t in chunks]
        return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])


# --- several prompts in one forward pass ---


def split_by_tokens(items, length, limit=None):
    """Yield lists of consecutive items with at most `limit` tokens in total, by default
    TOKENS_PER_FORWARD, or of one item. Args: length, a function from an item to its tokens."""
    batch, total, limit = [], 0, limit or TOKENS_PER_FORWARD
    for item in items:
        tokens = length(item)
        if batch and total + tokens > limit:
            yield batch
            batch, total = [], 0
        batch.append(item)
        total += tokens
    if batch:
        yield batch


def stack_prompts(caches):
    """The keys and values of B prompts as a list of PromptCache, one per layer. Args: caches, pairs
    of a transformers cache and the lengths of the prompts packed in it."""
    lengths = [length for _, group in caches for length in group]
    padding = None
    if len(set(lengths)) > 1:
        padding = torch.arange(max(lengths)) >= torch.tensor(lengths)[:, None]  # (B, P)
        padding = padding.to(caches[0][0].layers[0].keys.device)

    def stack(layer, name):
        parts = [getattr(c.layers[layer], name).split(group, 2) for c, group in caches]
        parts = [part for group in parts for part in group]  # B of (1, H_kv, P, D)
        return torch.cat([pad(x, (0, 0, 0, max(lengths) - x.shape[2])) for x in parts])

    layers = range(len(caches[0][0].layers))
    return [PromptCache(stack(i, "keys"), stack(i, "values"), padding) for i in layers]


def add_features(hidden, image_mask, features):
    """Add a level of the vision tower's features to the hidden states of the image tokens. Unlike
    transformers, this does not index with a mask, which would make the CPU wait for the GPU."""
    features = features.to(hidden.dtype)
    return hidden + torch.zeros_like(hidden).masked_scatter(image_mask[..., None], features)


@torch.no_grad()
def image_features(model, prompts):
    """The vision tower's output for all `prompts`, as transformers expects it. The frozen tower
    runs once per prompt, on the images of several prompts at once."""
    new = [prompt for prompt in prompts if prompt.features is None]
    if new:
        images = {k: torch.cat([prompt.image[k] for prompt in new]) for k in new[0].image}
        if "image_grid_thw" in images:
            # Every layer of the tower reads these lengths three times, so keep them on the CPU.
            merge = model.config.vision_config.spatial_merge_size
            patches = [math.prod(prompt.grid) * merge**2 for prompt in new]
            images["cu_seqlens"] = torch.tensor([0, *accumulate(patches)])
        out = model.get_image_features(**images)
        levels = out.pooler_output, *(getattr(out, "deepstack_features", None) or ())
        for prompt, *features in zip(new, *levels):
            prompt.features = features  # one tensor per level
    first, *deepstack = zip(*(prompt.features for prompt in prompts))
    first = torch.stack(first) if tile_grid(model.config) else first  # InternVL's are stacked
    return SimpleNamespace(pooler_output=first, deepstack_features=deepstack)
