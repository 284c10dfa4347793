"""One vision-language model: load it, lay out a prompt, sample a group and score a group.

The prompt and its image run once per group: sampling decodes G completions next to one cached
prompt, scoring packs prompt and completions into one sequence. attention.py makes both possible.
"""

import inspect
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache

from attention import Capture, stack_prompts
from config import InputError
from sources.pretrained import (
    add_lora,
    choose_device,
    load_adapter,
    load_pretrained,
    resolve_indices,
)

LOGITS_PER_CHUNK = 2**24  # floats: 64 MiB, about 110 tokens of Qwen's vocabulary


@dataclass
class Prompt:
    """A question about an image, as tokens."""

    input_ids: torch.Tensor  # (P,)
    image_positions: torch.Tensor  # (N,) positions of the image tokens in the prompt
    pixel_values: torch.Tensor
    image_grid_thw: torch.Tensor  # (1, 3) in patches
    position_ids: torch.Tensor  # (3, P): time, height, width (M-RoPE)
    grid: tuple[int, int]  # (rows, cols) of image tokens, rows * cols = N
    features: object = None  # output of the vision tower, once computed


@dataclass
class Completions:
    """G completions of one prompt. `mask` is true on real tokens, end of turn included: found by
    position, never by comparing with the padding token, which a model may write itself."""

    ids: torch.Tensor  # (G, C), padded on the right
    mask: torch.Tensor  # (G, C) bool
    texts: list[str] = ()
    temperature: float = 1.0  # of the distribution that scores them
    finished: torch.Tensor = None  # (G,) bool: ended by itself, not cut off

    def __getitem__(self, rows: slice):
        return Completions(self.ids[rows], self.mask[rows], self.texts[rows], self.temperature)


@dataclass
class Scores:
    """`logps` carries gradient outside `no_grad`; the rest never does. Padding holds garbage."""

    logps: torch.Tensor  # (G, C) log p of each token
    entropy: torch.Tensor  # (G, C) nats, of the distribution each token was drawn from
    attention: torch.Tensor | None = None  # (G, C, N), row j has token j as its query
    prompt_attention: torch.Tensor | None = None  # (N,), the row of the prompt's last token


class Vlm:
    """A Qwen2.5-VL or Qwen3-VL with LoRA; `load_vlm` makes it. `.model` is the PEFT model."""

    def __init__(self, model, tokenizer, processor, layers, heads, per_forward, checkpointing):
        self.model, self.tokenizer, self.image_processor = model, tokenizer, processor
        self.core = model.get_base_model()  # the transformers model under PEFT, LoRA in place
        self.device = self.core.device
        self.dtype = self.core.lm_head.weight.dtype  # of the computation; 4-bit weights have none
        # transformers 5.24 renames past_key_values, the argument and the output, to cache.
        known = inspect.signature(type(self.core.model).forward).parameters
        self.cache_name = "cache" if "cache" in known else "past_key_values"
        self.completions_per_forward, self.gradient_checkpointing = per_forward, checkpointing
        config, text = self.core.config, self.core.config.text_config
        self.layers = resolve_indices("layer", layers, text.num_hidden_layers)
        self.heads = resolve_indices("head", heads, text.num_attention_heads)
        if checkpointing:
            self.core.activation_checkpointing_enable({"use_reentrant": False})
        # Tokens that stand for an image are not words: they are neither sampled nor scored.
        names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
        ids = (getattr(config, name, None) for name in names)
        self.placeholders = [id for id in ids if id is not None]
        stop = self.core.generation_config.eos_token_id
        stop = tokenizer.eos_token_id if stop is None else stop
        stop = stop if isinstance(stop, list) else [stop]
        self.stop_ids = torch.tensor(stop, device=self.device)
        self.pad_id = stop[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id

    def load_adapter(self, folder):
        """Load the weights of a saved adapter, in place. Raises: InputError if they do not fit."""
        load_adapter(self.model, folder)

    def encode(self, image, question):
        """Lay out an image and a question by the model's chat template.

        The template's one image placeholder is repeated N times, N = prod(image_grid_thw) /
        merge_size^2, so it is plain to see where the image tokens are. Prompts are never truncated.
        Returns: Prompt. Raises: InputError if the question contains an image placeholder.
        """
        pixels = self.image_processor(images=[image.convert("RGB")], return_tensors="pt")
        patches, merge = pixels["image_grid_thw"], self.image_processor.merge_size
        rows, cols = patches[0, 1].item() // merge, patches[0, 2].item() // merge
        content = [{"type": "image"}, {"type": "text", "text": question}]
        chat = [{"role": "user", "content": content}]
        text = self.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        image_id = self.core.config.image_token_id
        placeholder = self.tokenizer.convert_ids_to_tokens(image_id)
        if text.count(placeholder) != 1:
            raise InputError(f"the question may not contain {placeholder}: {question!r}")
        text = text.replace(placeholder, placeholder * (rows * cols))
        ids = self.tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
        is_image = ids == image_id  # (1, P)
        layout = {"mm_token_type_ids": is_image.int(), "image_grid_thw": patches}
        positions, _ = self.core.model.get_rope_index(ids, **layout)  # (3, 1, P)
        where = is_image[0].nonzero()[:, 0]  # (N,)
        tensors = ids[0], where, pixels["pixel_values"], patches, positions[:, 0]
        return Prompt(*(tensor.to(self.device) for tensor in tensors), grid=(rows, cols))

    def sample(self, prompt, num_generations, max_tokens, temperature=1.0, generator=None):
        """The Completions of one prompt, see `sample_groups`."""
        return self.sample_groups([prompt], num_generations, max_tokens, temperature, generator)[0]

    @torch.no_grad()
    def sample_groups(self, prompts, num_generations, max_tokens, temperature=1.0, generator=None):
        """`num_generations` completions of up to `max_tokens` tokens for each of B prompts at once.
        Temperature 0 is greedy. There is no top-p: what is sampled is what `score` scores.
        Returns: B Completions, to be scored at the same temperature (greedy ones at 1)."""
        self.model.eval()
        G = num_generations
        hidden, prompt_caches, position = self._prefill(prompts, G)
        ids, live, own_cache = [], [], DynamicCache()
        done = torch.zeros(len(hidden), dtype=torch.bool, device=self.device)  # (B*G,)
        for step in range(max_tokens):
            logits = self._logits(hidden, temperature or 1.0)  # (B*G, V)
            if temperature == 0:
                token = logits.argmax(-1)
            else:
                p = logits.softmax(-1)  # drawn as torch.multinomial does, which crashes on NaN
                token = (p / torch.empty_like(p).exponential_(generator=generator)).argmax(-1)
            ids.append(token.masked_fill(done, self.pad_id))
            live.append(~done)
            done = done | torch.isin(token, self.stop_ids)
            if done.all() or step + 1 == max_tokens:
                break
            hidden = self._decode_step(ids[-1], position + step, prompt_caches, own_cache)
        ids, mask = torch.stack(ids, 1), torch.stack(live, 1)  # (B*G, C)
        groups = zip(ids.split(G), mask.split(G), done.split(G))
        return [self._completions(*group, temperature or 1.0) for group in groups]

    def _prefill(self, prompts, G):
        """Run every prompt once. Returns: the hidden states (B*G, D) that predict the first tokens,
        the prompts' caches, and the positions (B*G, 1) of the first tokens."""
        inputs = [(p, p.input_ids[None], p.position_ids[:, None]) for p in prompts]
        states, caches = zip(*(self._forward(*each, use_cache=True) for each in inputs))
        hidden = torch.cat([h[:, -1].expand(G, -1) for h in states])
        # With M-RoPE an image takes up fewer positions than tokens.
        position = torch.stack([p.position_ids.max() + 1 for p in prompts])
        return hidden, stack_prompts(caches), position.repeat_interleave(G)[:, None]

    def _decode_step(self, token, position, prompt_caches, own_cache):
        """Feed one token (B*G,) of every completion. Returns: hidden states (B*G, D)."""
        caches = {"use_cache": True, self.cache_name: own_cache, "prompts": prompt_caches}
        return self._forward(None, token[:, None], position.expand(3, -1, -1), **caches)[0][:, -1]

    def _completions(self, ids, mask, done, temperature):
        longest = mask.sum(1).max()  # other groups may be longer
        ids, mask = ids[:, :longest], mask[:, :longest]  # (G, C)
        decode = self.tokenizer.decode
        texts = [decode(row[real], skip_special_tokens=True) for row, real in zip(ids, mask)]
        return Completions(ids, mask, texts, temperature, done)

    def score(self, prompt, completions, attention=True, reference=False):
        """Log-probability, entropy and attention to the image of every token of a group, in one
        packed forward, or in several if `completions_per_forward` is less than G.

        Args: reference, switch the adapter off: the model before training.
        Returns: Scores; the attention is the mean over this Vlm's layers and heads.
        """
        G = len(completions.ids)
        step = self.completions_per_forward or G
        batches = [completions[i : i + step] for i in range(0, G, step)]
        with self.model.disable_adapter() if reference else nullcontext():
            parts = [self._score(prompt, batch, attention) for batch in batches]
        if len(parts) == 1:
            return parts[0]
        logps, entropy = (torch.cat([getattr(p, k) for p in parts]) for k in ("logps", "entropy"))
        maps = torch.cat([p.attention for p in parts]) if attention else None
        return Scores(logps, entropy, maps, parts[0].prompt_attention)

    @torch.no_grad()
    def attention_maps(self, prompt, completions):
        """The attention to the image of every layer and head, for analysis rather than training.

        Returns: (L, H, G, C, N), and (L, H, N) of the prompt's last token. Keep G small.
        """
        text = self.core.config.text_config
        layers, heads = range(text.num_hidden_layers), range(text.num_attention_heads)
        capture = Capture(layers, heads, prompt.image_positions, average_heads=False)
        self._packed_forward(prompt, completions, capture)
        maps = torch.stack([capture.maps[layer] for layer in layers])  # (L, H, 1 + G*C, N)
        return maps[:, :, 1:].unflatten(2, completions.ids.shape), maps[:, :, 0]

    def _score(self, prompt, completions, attention):
        P, (G, C) = len(prompt.input_ids), completions.ids.shape
        capture = Capture(self.layers, self.heads, prompt.image_positions) if attention else None
        hidden = self._packed_forward(prompt, completions, capture)[0]  # (P + G*C, D)
        # The prompt's last token predicts the first one; each token predicts its successor.
        first, rest = hidden[P - 1].expand(G, 1, -1), hidden[P:].view(G, C, -1)[:, :-1]
        predictors = torch.cat([first, rest], 1).flatten(0, 1)  # (G*C, D)
        targets, temperature = completions.ids.flatten(), completions.temperature
        logps, entropy = self._token_scores(predictors, targets, temperature)
        scores = Scores(logps.view(G, C), entropy.view(G, C))
        if attention:
            maps = sum(capture.maps.values()) / len(self.layers)  # (1 + G*C, N)
            scores.prompt_attention, scores.attention = maps[0], maps[1:].view(G, C, -1)
        return scores

    def _packed_forward(self, prompt, completions, capture):
        """Hidden states (1, P + G*C, D) of `[prompt | c_1 | ... | c_G]`."""
        # Checkpointing needs train mode, caching forbids it; no module here uses dropout.
        self.model.train(self.gradient_checkpointing and torch.is_grad_enabled())
        P, (G, C) = len(prompt.input_ids), completions.ids.shape
        ids = torch.cat([prompt.input_ids, completions.ids.flatten()])  # (P + G*C,)
        start = prompt.position_ids.max() + 1  # of every completion
        after = start + torch.arange(C, device=self.device)
        positions = torch.cat([prompt.position_ids, after.repeat(3, G)], dim=1)  # (3, P + G*C)
        # A completion sees the prompt and its own past.
        mask = torch.ones(1, 1, C, P + C, dtype=torch.bool, device=self.device).tril(P)
        layout = {"packed": (P, G, C), "attention_mask": mask, "capture": capture}
        return self._forward(prompt, ids[None], positions[:, None], **layout)[0]

    def _forward(self, prompt, ids, positions, **kwargs):
        """Hidden states (B, S, D) of the last layer, and the cache. `prompt` provides the image, if
        `ids` contain one; the frozen vision tower runs once per prompt."""
        if prompt is not None:
            if prompt.features is None:
                image = prompt.pixel_values, prompt.image_grid_thw
                with torch.no_grad():
                    prompt.features = self.core.model.get_image_features(*image)
            kwargs["mm_encoder_outputs"] = {"image": prompt.features}
        kwargs.setdefault("use_cache", False)
        out = self.core.model(input_ids=ids, position_ids=positions, **kwargs)
        return out.last_hidden_state, getattr(out, self.cache_name)

    def _logits(self, hidden, temperature):
        """fp32 logits (R, V) of the distribution that is sampled and scored, of states (R, D)."""
        logits = self.core.lm_head(hidden).float().div_(temperature)
        logits[:, self.placeholders] = -torch.inf
        return logits

    def _token_scores(self, hidden, targets, temperature):
        """log p of `targets` (R,) and the entropy (R,), of states (R, D), in chunks of rows: the
        logits of a chunk are dropped, and computed again for the gradient. (R, V) never exists."""

        def chunk(hidden, targets):
            logps = self._logits(hidden, temperature).log_softmax(-1)  # (rows, V)
            # The entropy comes last and needs no gradient: recomputation stops before it.
            chosen = logps.gather(-1, targets[:, None])[:, 0]
            return chosen, torch.special.entr(logps.detach().exp()).sum(-1)

        rows = max(1, LOGITS_PER_CHUNK // self.core.config.text_config.vocab_size)
        chunks = zip(hidden.split(rows), targets.split(rows))
        parts = [checkpoint(chunk, h, t, use_reentrant=False) for h, t in chunks]
        return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])


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
    """Load a Qwen2.5-VL or Qwen3-VL from the hub or a folder, in 4 bits, frozen but for LoRA on the
    language model's linear layers.

    Args: device, by default CUDA if available; max_pixels, images are scaled down to this area;
    completions_per_forward, 0 for a whole group; layers and heads whose attention `score`
    averages, None for all; dtype, by default the device's. Returns: Vlm. Raises: InputError.
    """
    device, dtype = choose_device(device, dtype)
    model, tokenizer, processor = load_pretrained(str(name_or_path), load_in_4bit, device, dtype)
    if max_pixels:
        least = min(processor.size["shortest_edge"], max_pixels // 2)  # small images are scaled up
        processor.size = {"shortest_edge": least, "longest_edge": max_pixels}
    model = add_lora(model, lora_r, lora_alpha)
    settings = layers, heads, completions_per_forward, gradient_checkpointing
    return Vlm(model, tokenizer, processor, *settings)
