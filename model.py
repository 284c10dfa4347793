"""One vision-language model: load it, lay out a prompt, sample a group and score a group.

The prompt and its image run once per group: sampling decodes G completions next to one cached
prompt, scoring packs prompt and completions into one sequence. attention.py makes both possible.
"""

import inspect
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch.utils.checkpoint import checkpoint

from attention import Capture, PackedGroup
from config import InputError
from sources.decoding import Decoder, GraphDecoder
from sources.packing import image_features, split_by_tokens, stack_prompts
from sources.pretrained import (
    add_lora,
    choose_device,
    load_adapter,
    load_pretrained,
    resolve_indices,
)

LOGITS_PER_CHUNK = 2**24  # floats, 64 MiB: the logits of about 110 tokens with Qwen's vocabulary
CHECK_DONE = {"cuda": 8}  # tokens between checks for the end of all completions: each waits


@dataclass
class Prompt:
    """A question about an image, as tokens."""

    input_ids: torch.Tensor  # (P,)
    image_positions: torch.Tensor  # (N,) positions of the image tokens in the prompt
    pixel_values: torch.Tensor
    image_grid_thw: torch.Tensor  # (1, 3) in patches
    position_ids: torch.Tensor  # (3, P): time, height, width (M-RoPE)
    grid: tuple[int, int]  # (rows, cols) of image tokens, rows * cols = N
    features: list = None  # of the vision tower, once computed: (N, D), then deepstack's levels


@dataclass
class Completions:
    """G completions of one prompt. `mask` is true on real tokens including the end of turn. It is
    determined by position, because a model may itself write the padding token."""

    ids: torch.Tensor  # (G, C), padded on the right
    mask: torch.Tensor  # (G, C) bool
    texts: list[str] = ()
    temperature: float = 1.0  # used for scoring
    finished: torch.Tensor = None  # (G,) bool: ended with a stop token

    def __getitem__(self, rows: slice):
        return Completions(self.ids[rows], self.mask[rows], self.texts[rows], self.temperature)


@dataclass
class Scores:
    """Only `logps` carries gradient, outside `no_grad`. Values at padding are undefined."""

    logps: torch.Tensor  # (G, C) log p of each token
    entropy: torch.Tensor  # (G, C) nats, of the distribution each token was drawn from
    attention: torch.Tensor | None = None  # (G, C, N), row j has token j as its query
    prompt_attention: torch.Tensor | None = None  # (N,), the row of the prompt's last token


class Vlm:
    """A Qwen2.5-VL or Qwen3-VL with LoRA; created by `load_vlm`. `.model` is the PEFT model."""

    cuda_graph = False  # decode with `GraphDecoder`

    def __init__(self, model, tokenizer, processor, layers, heads, per_forward, checkpointing):
        self.model, self.tokenizer, self.image_processor = model, tokenizer, processor
        self.core = model.get_base_model()  # the transformers model under PEFT, LoRA in place
        self.device = self.core.device
        self.dtype = self.core.lm_head.weight.dtype  # to compute in; 4-bit weights hide it
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
        names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
        ids = (getattr(config, name, None) for name in names)
        ids = [id for id in ids if id is not None]
        self.placeholders = torch.tensor(ids, device=self.device)
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
        merge_size^2, so that every image token has a place. Prompts are never truncated.
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
        """`num_generations` completions of up to `max_tokens` tokens for each of B prompts at once,
        without top-p, so that sampling and scoring use one distribution. Temperature 0 is greedy.
        Returns: B Completions, to be scored at the same temperature (greedy ones at 1)."""
        G, check_every = num_generations, CHECK_DONE.get(self.device.type, 1)
        hidden, prompt_caches, start = self._prefill(prompts, G)
        decoder, ids, live = self._decoder(prompt_caches, start, max_tokens), [], []
        done = torch.zeros(len(hidden), dtype=torch.bool, device=self.device)  # (B*G,)
        for step in range(max_tokens):
            logits = self._logits(hidden, temperature or 1.0)  # (B*G, V)
            if temperature == 0:
                token = logits.argmax(-1)
            else:
                p = logits.softmax(-1)  # torch.multinomial's draw, but safe with NaN
                token = (p / torch.empty_like(p).exponential_(generator=generator)).argmax(-1)
            ids.append(token.masked_fill(done, self.pad_id))
            live.append(~done)
            done = done | torch.isin(token, self.stop_ids)
            if step + 1 == max_tokens or step % check_every == 0 and done.all():
                break
            hidden = decoder.step(ids[-1], step)
        ids, mask = torch.stack(ids, 1), torch.stack(live, 1)  # (B*G, C)
        groups = zip(ids.split(G), mask.split(G), done.split(G))
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
        longest = mask.sum(1).max()  # other groups may be longer
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

        Args: reference, switch the adapter off: the model before training.
        Returns: a list of Scores; the attention is the mean over this Vlm's layers and heads.
        """
        size = self.completions_per_forward
        with self.model.disable_adapter() if reference else nullcontext():
            if 0 < size < max(len(c.ids) for c in completions):
                groups = zip(prompts, completions)
                return [self._score_in_parts(*group, attention, size) for group in groups]
            return self._score(prompts, completions, attention)

    def _score_in_parts(self, prompt, completions, attention, size):
        rows = [completions[i : i + size] for i in range(0, len(completions.ids), size)]
        parts = [self._score([prompt], [part], attention)[0] for part in rows]
        logps, entropy = (torch.cat([getattr(p, k) for p in parts]) for k in ("logps", "entropy"))
        maps = torch.cat([p.attention for p in parts]) if attention else None
        return Scores(logps, entropy, maps, parts[0].prompt_attention)

    def _score(self, prompts, completions, attention):
        capture = Capture(self.layers, self.heads) if attention else None
        (temperature,) = {c.temperature for c in completions}  # one for all groups
        ids, predictors = [c.ids for c in completions], []
        hidden, _ = self._packed_forward(prompts, ids, capture)
        lengths = [len(p.input_ids) + x.numel() for p, x in zip(prompts, ids)]
        for prompt, x, h in zip(prompts, ids, hidden.split(lengths)):
            P = len(prompt.input_ids)
            # The prompt's last token predicts the first one; each token predicts its successor.
            first, rest = h[P - 1].expand(len(x), 1, -1), h[P:].view(*x.shape, -1)[:, :-1]
            predictors.append(torch.cat([first, rest], 1).flatten(0, 1))  # (G*C, D)
        targets = torch.cat([x.flatten() for x in ids])
        values = self._token_scores(torch.cat(predictors), targets, temperature)
        values = zip(*(v.split([x.numel() for x in ids]) for v in values))
        scores = [Scores(*(v.view(x.shape) for v in pair)) for pair, x in zip(values, ids)]
        for number, group in enumerate(scores if attention else ()):
            maps = sum(layer[number] for layer in capture.maps.values()) / len(self.layers)
            group.prompt_attention = maps[0]
            group.attention = maps[1:].view(*group.logps.shape, -1)  # (G, C, N)
        return scores

    def _packed_forward(self, prompts, ids, capture=None, **kwargs):
        """Run `[prompt | c_1 | ... | c_G]` of several groups as one sequence. Args: ids (G, C) of
        every group. Returns: hidden states (S, D) of the last layer, and the cache."""
        # transformers checkpoints only in train mode, and caches only outside it.
        self.model.train(self.gradient_checkpointing and torch.is_grad_enabled())
        tokens, positions, packed = [], [], []
        for prompt, (G, C), completions in zip(prompts, (x.shape for x in ids), ids):
            P, start = len(prompt.input_ids), prompt.position_ids.max() + 1  # of every completion
            after = (start + torch.arange(C, device=self.device)).repeat(3, G)
            tokens += [prompt.input_ids, completions.flatten()]
            positions += [prompt.position_ids, after]
            # A completion sees the prompt and its own past.
            mask = torch.ones(1, 1, C, P + C, dtype=torch.bool, device=self.device).tril(P)
            packed.append(PackedGroup(P, G, C, prompt.image_positions, mask))
        out = self.core.model(
            input_ids=torch.cat(tokens)[None],
            position_ids=torch.cat(positions, 1)[:, None],
            attention_mask=packed[0].mask,  # not used: keeps transformers from building a large one
            mm_encoder_outputs={"image": image_features(self.core.model, prompts)},
            **{"use_cache": False, "packed": packed, "capture": capture} | kwargs,
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
            # The entropy is computed last, so that recomputation can stop before it.
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
    """Load a Qwen2.5-VL or Qwen3-VL from the hub or a folder, frozen except for LoRA on the
    language model's linear layers, which are quantized to 4 bits by default.

    Args: device, by default CUDA if available; max_pixels, images are scaled down to this area;
    completions_per_forward, 0 for a whole group; layers and heads whose attention `score`
    averages, None for all; dtype, from `choose_device`. Returns: Vlm. Raises: InputError.
    """
    device, dtype = choose_device(device, dtype)
    model, tokenizer, processor = load_pretrained(str(name_or_path), load_in_4bit, device, dtype)
    if max_pixels:
        least = min(processor.size["shortest_edge"], max_pixels // 2)  # must be below the limit
        processor.size = {"shortest_edge": least, "longest_edge": max_pixels}
    if model.num_parameters() < 1e7:
        torch.set_num_threads(min(2, torch.get_num_threads()))  # more threads do not help
    model = add_lora(model, lora_r, lora_alpha)
    settings = layers, heads, completions_per_forward, gradient_checkpointing
    return Vlm(model, tokenizer, processor, *settings)
