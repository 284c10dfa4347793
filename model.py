"""One vision-language model: load it in 4 bits with LoRA, lay out its tokens, sample a group, score a group.

*The prompt and its image run once per group, and are kept once*: sampling decodes G completions beside one cached
prompt, scoring packs it with all of them into one sequence. The attention that makes this possible, and the record of
where it looks, are in attention.py.
"""

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageTextToText,
    AutoTokenizer,
    BitsAndBytesConfig,
    DynamicCache,
)

from attention import Capture, stack
from data import InputError

LINEAR = r".*language_model\.layers.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
LOGITS = 2**24  # floats of logits alive at once: 64 MiB, about 110 tokens of Qwen's vocabulary


@dataclass
class Prompt:
    """A question about an image, laid out in tokens."""

    input_ids: torch.Tensor  # (P,)
    image_positions: torch.Tensor  # (N,) where in the prompt the image tokens lie
    pixel_values: torch.Tensor
    image_grid_thw: torch.Tensor  # (1, 3) in patches
    position_ids: torch.Tensor  # (3, P): time, height, width (M-RoPE)
    grid: tuple[int, int]  # (rows, cols), rows * cols = N
    features: object = None  # the vision tower's output, once it has been computed


@dataclass
class Completions:
    """G answers to one prompt. `mask` is true on real tokens, the end-of-turn token included: by position, never by
    comparing with the padding token, which a model may well write itself."""

    ids: torch.Tensor  # (G, C), padded on the right
    mask: torch.Tensor  # (G, C) bool
    texts: list[str] = ()
    temperature: float = 1.0  # of the distribution to score them under
    finished: torch.Tensor = None  # (G,) bool: did it end by itself, or was it cut off?

    def __getitem__(self, rows: slice):
        return Completions(self.ids[rows], self.mask[rows], self.texts[rows], self.temperature)


@dataclass
class Scores:
    """`logps` carries gradient outside `no_grad`; the others never do. Values at padding mean nothing."""

    logps: torch.Tensor  # (G, C) log p of each token
    entropy: torch.Tensor  # (G, C) nats, of the distribution each token was drawn from
    attention: torch.Tensor | None = None  # (G, C, N), row j has token j as its query
    prompt_attention: torch.Tensor | None = None  # (N,), the row of the prompt's last token


class Vlm:
    """A Qwen2.5-VL or Qwen3-VL with LoRA. Made by `load_vlm`; `.model` is the PEFT-wrapped transformers model."""

    def __init__(
        self, model, tokenizer, image_processor, gradient_checkpointing, completions_per_forward, layers, heads
    ):
        self.model, self.tokenizer, self.image_processor = model, tokenizer, image_processor
        self.core = model.get_base_model()  # the transformers model under PEFT, with LoRA in place
        self.device = self.core.device
        self.gradient_checkpointing, self.completions_per_forward = gradient_checkpointing, completions_per_forward
        config, text = self.core.config, self.core.config.text_config
        self.layers = _resolve("layer", layers, text.num_hidden_layers)
        self.heads = _resolve("head", heads, text.num_attention_heads)
        if gradient_checkpointing:
            self.core.activation_checkpointing_enable({"use_reentrant": False})
        # What stands for an image in the prompt is no word: it can be neither sampled nor scored.
        names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
        self.placeholders = [getattr(config, name) for name in names if getattr(config, name, None) is not None]
        stop = self.core.generation_config.eos_token_id
        stop = tokenizer.eos_token_id if stop is None else stop
        self.stop_ids = torch.tensor(stop if isinstance(stop, list) else [stop], device=self.device)
        self.pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else self.stop_ids[0].item()

    def load_adapter(self, folder):
        """Load the weights of an adapter that a run has left, in place. Raises: InputError if they do not fit."""
        try:
            found = set_peft_model_state_dict(self.model, load_file(Path(folder) / "adapter_model.safetensors"))
        except (OSError, SafetensorError) as error:
            raise InputError(f"no adapter in {folder}: {error}") from None
        except RuntimeError as error:
            raise InputError(
                f"the adapter in {folder} is of another size: --lora_r? ({str(error).split(chr(10))[0]})"
            ) from None
        if found.unexpected_keys:
            raise InputError(f"the adapter in {folder} is of another model: it has {found.unexpected_keys[0]}")

    def encode(self, image, question):
        """Lay out one image and one question as the model's chat template has them.

        The template's single image placeholder is written N times, N = prod(image_grid_thw) / merge_size^2: the
        reader sees where image tokens lie. Prompts are never truncated; bound the pixels instead.
        Returns: Prompt. Raises: InputError if the question itself holds an image placeholder.
        """
        pixels = self.image_processor(images=[image.convert("RGB")], return_tensors="pt")
        merge, (_, height, width) = self.image_processor.merge_size, pixels["image_grid_thw"][0].tolist()
        rows, cols = height // merge, width // merge
        chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
        text = self.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        placeholder = self.tokenizer.convert_ids_to_tokens(self.core.config.image_token_id)
        if text.count(placeholder) != 1:
            raise InputError(f"the question may not contain {placeholder}: {question!r}")
        text = text.replace(placeholder, placeholder * (rows * cols))
        ids = self.tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids  # (1, P)
        is_image = ids == self.core.config.image_token_id
        patches = pixels["image_grid_thw"]
        positions, _ = self.core.model.get_rope_index(ids, mm_token_type_ids=is_image.int(), image_grid_thw=patches)
        values = ids[0], is_image[0].nonzero()[:, 0], pixels["pixel_values"], patches, positions[:, 0]
        return Prompt(*(v.to(self.device) for v in values), grid=(rows, cols))

    def sample(self, prompt, num_generations, max_tokens, temperature=1.0, generator=None):
        """The Completions of one prompt, see `sample_groups`."""
        return self.sample_groups([prompt], num_generations, max_tokens, temperature, generator)[0]

    @torch.no_grad()
    def sample_groups(self, prompts, num_generations, max_tokens, temperature=1.0, generator=None):
        """Write `num_generations` completions of at most `max_tokens` tokens to each of B prompts, all side by side.

        Every prompt runs once, and its cache serves all its completions. Temperature 0 is greedy. There is no top-p:
        what is sampled is the whole distribution that `score` scores.
        Returns: Completions of each prompt, scored at the same temperature (greedy ones at 1).
        """
        self.model.eval()
        G, all_rows = num_generations, len(prompts) * num_generations
        runs = [self._forward(p, p.input_ids[None], p.position_ids[:, None], use_cache=True) for p in prompts]
        hidden = torch.cat([states[:, -1].expand(G, -1) for states, _ in runs])  # (B*G, D)
        prefix, own = stack([cache for _, cache in runs]), DynamicCache()
        del runs  # their caches are in the stack
        # M-RoPE: an image takes fewer positions than tokens
        position = torch.stack([p.position_ids.max() + 1 for p in prompts]).repeat_interleave(G)[:, None]  # (B*G, 1)
        ids, live, done = [], [], torch.zeros(all_rows, dtype=torch.bool, device=self.device)
        for step in range(max_tokens):
            logits = self._logits(hidden, temperature or 1.0)  # (B*G, V)
            if temperature == 0:
                token = logits.argmax(-1)
            else:
                token = torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]
            ids.append(token.masked_fill(done, self.pad_id))
            live.append(~done)
            done = done | torch.isin(token, self.stop_ids)
            if done.all() or step + 1 == max_tokens:
                break
            positions = (position + step).expand(3, -1, -1)
            new = ids[-1][:, None]
            hidden, own = self._forward(None, new, positions, use_cache=True, past_key_values=own, prefix=prefix)
            hidden = hidden[:, -1]
        ids, mask = torch.stack(ids, 1), torch.stack(live, 1)  # (B*G, C)
        groups = zip(ids.split(G), mask.split(G), done.split(G))
        return [self._completions(*group, temperature or 1.0) for group in groups]

    def _completions(self, ids, mask, done, temperature):
        longest = mask.sum(1).max()  # other groups may have written on
        ids, mask = ids[:, :longest], mask[:, :longest]  # (G, C)
        texts = [self.tokenizer.decode(row[real], skip_special_tokens=True) for row, real in zip(ids, mask)]
        return Completions(ids, mask, texts, temperature, done)

    def score(self, prompt, completions, attention=True, reference=False):
        """Log-probability, entropy and attention to the image of every token of a group, in one packed forward.

        If `completions_per_forward` is less than G, in several forwards with the prompt repeated in each.
        Args: reference, whether to switch the adapter off: the model as it was before training.
        Returns: Scores; the attention is the mean over this Vlm's layers and heads.
        """
        G = len(completions.ids)
        step = self.completions_per_forward or G
        with self.model.disable_adapter() if reference else nullcontext():
            parts = [self._score(prompt, completions[i : i + step], attention) for i in range(0, G, step)]
        whole = parts[0]
        if len(parts) > 1:
            for name in ("logps", "entropy", "attention") if attention else ("logps", "entropy"):
                setattr(whole, name, torch.cat([getattr(part, name) for part in parts]))
        return whole

    @torch.no_grad()
    def maps(self, prompt, completions):
        """Every layer and head apart, for looking rather than training: attention (L, H, 1 + G*C, N) to the image from
        the prompt's last token and all tokens of a group. Memory grows with L x H: keep the group small."""
        text = self.core.config.text_config
        layers, heads = range(text.num_hidden_layers), range(text.num_attention_heads)
        capture = Capture(layers, heads, prompt.image_positions, each_head=True)
        self._packed(prompt, completions, capture)
        return torch.stack([capture.maps[layer] for layer in layers])

    def _score(self, prompt, completions, attention):
        P, (G, C) = len(prompt.input_ids), completions.ids.shape
        capture = Capture(self.layers, self.heads, prompt.image_positions) if attention else None
        hidden = self._packed(prompt, completions, capture)
        # The first token of every completion is predicted by the last of the prompt, the others by their predecessor.
        before = torch.arange(P - 1, P + G * C - 1, device=self.device).view(G, C)
        before[:, 0] = P - 1
        targets, temperature = completions.ids.flatten(), completions.temperature
        logps, entropy = self._token_scores(hidden[0, before.flatten()], targets, temperature)
        scores = Scores(logps.view(G, C), entropy.view(G, C))
        if attention:
            maps = sum(capture.maps.values()) / len(self.layers)  # (1 + G*C, N)
            scores.prompt_attention, scores.attention = maps[0], maps[1:].view(G, C, -1)
        return scores

    def _packed(self, prompt, completions, capture):
        """The forward of `[prompt | c_1 | ... | c_G]`: hidden states (1, P + G*C, D)."""
        # checkpointing is only done in train mode, where caching is impossible; no module here uses dropout
        self.model.train(self.gradient_checkpointing and torch.is_grad_enabled())
        P, (G, C) = len(prompt.input_ids), completions.ids.shape
        ids = torch.cat([prompt.input_ids, completions.ids.flatten()])  # (P + G*C,): prompt | c_1 | ... | c_G
        after = prompt.position_ids.max() + 1 + torch.arange(C, device=self.device)  # every completion starts there
        positions = torch.cat([prompt.position_ids, after.repeat(3, G)], dim=1)  # (3, P + G*C)
        sees = torch.ones(1, 1, C, P + C, dtype=torch.bool, device=self.device).tril(P)  # the prompt, and its own past
        layout = {"packed": (P, G, C), "attention_mask": sees, "capture": capture}
        return self._forward(prompt, ids[None], positions[:, None], **layout)[0]

    def _forward(self, prompt, ids, positions, **kwargs):
        """Hidden states (B, S, D) of the last layer, and the cache. `prompt` brings the image, if `ids` holds one;
        the frozen vision tower runs once per prompt and its features serve every later forward."""
        if prompt is not None:
            if prompt.features is None:
                with torch.no_grad():
                    prompt.features = self.core.model.get_image_features(prompt.pixel_values, prompt.image_grid_thw)
            kwargs["mm_encoder_outputs"] = {"image": prompt.features}
        kwargs.setdefault("use_cache", False)
        out = self.core.model(input_ids=ids, position_ids=positions, **kwargs)
        return out.last_hidden_state, out.past_key_values

    def _logits(self, hidden, temperature):
        """fp32 logits (R, V) of the distribution that is sampled and scored, from hidden states (R, D)."""
        logits = self.core.lm_head(hidden).float().div_(temperature)
        logits[:, self.placeholders] = -torch.inf
        return logits

    def _token_scores(self, hidden, targets, temperature):
        """log p of `targets` (R,) and the entropy (R,), from hidden states (R, D), in chunks of rows: the logits of
        a chunk are dropped and, for the gradient, computed again. (R, V) never exists."""

        def chunk(hidden, targets):
            logps = self._logits(hidden, temperature).log_softmax(-1)  # (rows, V)
            chosen = logps.gather(-1, targets[:, None])[:, 0]  # before the entropy: recomputation ends here
            return chosen, torch.special.entr(logps.detach().exp()).sum(-1)

        rows = max(1, LOGITS // self.core.config.text_config.vocab_size)
        parts = [checkpoint(chunk, h, t, use_reentrant=False)
                 for h, t in zip(hidden.split(rows), targets.split(rows))]  # fmt: skip
        return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])


def load_vlm(name_or_path, load_in_4bit=True, lora_r=16, lora_alpha=32, device=None, max_pixels=None,
             gradient_checkpointing=False, completions_per_forward=0, layers=(-1,), heads=None):  # fmt: skip
    """Load a Qwen2.5-VL or Qwen3-VL from the hub or a folder; NF4 with double quantisation; LoRA on the language
    model's linear layers. Vision tower, embeddings and output head stay unquantised and frozen. The compute type is
    bf16 where the card has it, else fp16; fp32 on a CPU.

    Args: device, by default CUDA if there is any; max_pixels, to which images are scaled down; completions_per_forward,
    0 for all of a group; layers and heads whose attention `score` averages, None for all.
    Returns: Vlm. Raises: InputError with one line that says what to do.
    """
    name = str(name_or_path)
    automatic = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(automatic if device in (None, "auto") else device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"device {device}: no CUDA here; choose --device cpu")
    half = torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float16
    dtype = torch.float32 if device.type == "cpu" else half
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=[".*visual", "lm_head"],
    )  # fmt: skip
    safe = {"trust_remote_code": False}  # unless told, the library asks whether to run the code in a folder
    try:
        kind = AutoConfig.from_pretrained(name, **safe).model_type
        if kind not in ("qwen2_5_vl", "qwen3_vl"):
            raise InputError(f"{name} is a {kind}; this program knows qwen2_5_vl and qwen3_vl")
        tokenizer = AutoTokenizer.from_pretrained(name, **safe)
        processor = AutoImageProcessor.from_pretrained(name, backend="pil", **safe)  # needs no torchvision
        model = AutoModelForImageTextToText.from_pretrained(
            name, dtype=dtype, quantization_config=quantization if load_in_4bit else None, use_safetensors=True,
            attn_implementation="sayo", device_map={"": device}, **safe,
        )  # fmt: skip
    except torch.OutOfMemoryError:
        raise InputError(
            f"{name} does not fit on {device}: choose a smaller model, or drop --no-load_in_4bit"
        ) from None
    except ImportError as error:
        raise InputError(f"pip install bitsandbytes, or give --no-load_in_4bit ({error})") from None
    except InputError:
        raise
    except (OSError, ValueError) as error:
        where = (
            "is no folder of a model" if Path(name).exists() else "cannot be had from the hub: check name and network"
        )
        raise InputError(f"{name} {where} ({str(error).splitlines()[0]})") from None
    if max_pixels:
        least = min(processor.size["shortest_edge"], max_pixels // 2)  # half: small images are rounded up to cells
        processor.size = {"shortest_edge": least, "longest_edge": max_pixels}
    model.requires_grad_(False)
    for module in model.modules():
        # On some CPUs bitsandbytes repacks frozen weights in bf16 once they are used without gradient: sampling and
        # training would then be two different models, and a run would depend on the make of the processor.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    config = LoraConfig(r=lora_r, lora_alpha=lora_alpha, lora_dropout=0.0, target_modules=LINEAR)
    settings = gradient_checkpointing, completions_per_forward, layers, heads
    return Vlm(get_peft_model(model, config), tokenizer, processor, *settings)


def _resolve(what, indices, count):
    """Indices from 0, all if None. Raises: InputError if one is out of range."""
    for i in indices or ():
        if not -count <= i < count:
            raise InputError(f"no {what} {i}: the model has {count}, 0 to {count - 1}, or -1 for the last")
    return sorted({i % count for i in indices}) if indices else list(range(count))
