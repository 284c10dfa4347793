"""Make the tiny model that ships in this folder, from nothing: `python tiny/make.py`.

A Qwen3-VL of 1.6 M parameters with a 62-word tokenizer learns to answer the questions of `scenes.Scenes`. It writes
where the card is before what is on it, so a wrong look carries on into the answer. Two stages:

1. See. Correct answers, four questions about each image. A dense side task breaks the long plateau at the start: at
   every image token, after every layer, the language model also predicts what the cell shows (card, dot, row and column
   in equal parts). In 30 % of the answers the place named is another card's and the answer is that card's dot: the
   words that name the wrong place bear no loss, the dot does, so what is said to be *there* is read from there.
2. Be careless. In a fixed share of the answers the teacher looks at the card nearest the centre of the image instead
   of the one asked for, and now the wrong place bears loss. The model still can see, but often does not look
   where it should: the fault that SAYO's reward is meant to mend.
"""

import argparse
import math
import random
import sys
import time
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from tqdm import tqdm
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen2VLImageProcessorPil,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from data import region_mask
from scenes import NAMES, Scenes, draw, question

SIZE, GRID = 112, (7, 7)  # pixels, image tokens
PLACE_WEIGHT = 2  # of the loss on the words that name the place: they are learned last
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
           "<|video_pad|>", "<|unk|>"]  # fmt: skip
WORDS = "user assistant system what color number is the dot on card at its . ? : , a".split()
WORDS += NAMES + [f"r{i + 1}" for i in range(GRID[0])] + [f"c{i + 1}" for i in range(GRID[1])] + list("0123456789")
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.content is string %}{{ m.content }}{% else %}{% for part in m.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tokenizer():
    """One token a word, lower case, Qwen's special tokens and a chat template of Qwen's form."""
    vocabulary = {word: i for i, word in enumerate(SPECIAL + ["<answer>", "</answer>"] + WORDS)}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<|unk|>"))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex(r"[.,:?]"), "isolated")]
    )
    core.add_tokens(["<answer>", "</answer>"])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|endoftext|>", unk_token="<|unk|>",
        additional_special_tokens=SPECIAL[:-1], clean_up_tokenization_spaces=False,
    )  # fmt: skip
    tokenizer.chat_template = CHAT
    return tokenizer


def make_model(tokenizer):
    """Qwen3-VL in miniature: 112 px images, 8 px patches merged 2 x 2, so 7 x 7 image tokens."""
    ids = {name: tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in
           ("image_pad", "video_pad", "vision_start", "vision_end", "im_end", "endoftext")}  # fmt: skip
    config = Qwen3VLConfig(
        text_config=dict(
            vocab_size=64, hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4,
            num_key_value_heads=2, head_dim=32, max_position_embeddings=1024, rope_parameters=dict(
                rope_type="default", rope_theta=10000.0, mrope_section=[6, 5, 5], mrope_interleaved=True),
            tie_word_embeddings=True, eos_token_id=ids["im_end"], pad_token_id=ids["endoftext"],
        ),
        vision_config=dict(
            depth=3, hidden_size=96, intermediate_size=384, num_heads=4, patch_size=8, spatial_merge_size=2,
            temporal_patch_size=2, out_hidden_size=128, num_position_embeddings=196, deepstack_visual_indexes=[1],
        ),
        image_token_id=ids["image_pad"], video_token_id=ids["video_pad"], tie_word_embeddings=True,
        vision_start_token_id=ids["vision_start"], vision_end_token_id=ids["vision_end"],
    )  # fmt: skip
    assert len(tokenizer) <= config.text_config.vocab_size, len(tokenizer)
    model = Qwen3VLForConditionalGeneration(config)
    model.generation_config = GenerationConfig(eos_token_id=ids["im_end"], pad_token_id=ids["endoftext"])
    return model


def center(card):
    x1, y1, x2, y2 = card.box
    return (x1 + x2) / 2, (y1 + y2) / 2


def place(card):
    """The row and column words of the cell that holds the card's centre."""
    x, y = center(card)
    return f"r{int(y * GRID[0] / SIZE) + 1}", f"c{int(x * GRID[1] / SIZE) + 1}"


def answer(asked, looked_at):
    """First where, then what. The place follows the colour at once: what is looked for is then the token at hand."""
    row, column = place(looked_at)
    mark = looked_at.mark
    return f"the dot on {asked.color} {row} {column} is {mark} . <answer> {mark} </answer>"


def cell_words(cards):
    """For every image token the words of what it shows: of the card whose centre it holds the colour, dot, row and
    column; "." on the background; nothing where it holds but a part of a card."""
    words = [["."] for _ in range(GRID[0] * GRID[1])]
    for card in cards:
        for cell in region_mask([card.box], (SIZE, SIZE), GRID).nonzero().flatten().tolist():
            words[cell] = []
    for card in cards:
        row, column = place(card)
        words[(int(row[1]) - 1) * GRID[1] + int(column[1]) - 1] = [card.color, card.mark, row, column]
    return words


class Teacher:
    """Batches of images, each with four questions and answers as the turns of one chat."""

    def __init__(self, tokenizer, seed, turns=4):
        self.tokenizer, self.turns, self.next = tokenizer, turns, 0
        self.scenes = Scenes("train", 10**9, seed=seed, cards=(4, 8), card_size=(14, 26))
        self.rng = random.Random(seed)
        self.processor = make_processor()

    def sample(self, careless):
        cards = self.scenes.layout(self.next)
        self.next += 1
        messages, silent = [], []  # silent: does the wrong place bear no loss?
        for turn, asked in enumerate(self.rng.sample(cards, self.turns)):
            looked_at, mute = asked, False
            if careless is None and self.rng.random() < 0.3:
                looked_at, mute = self.rng.choice(cards), True
            elif careless is not None and self.rng.random() < careless:
                looked_at = min(cards, key=lambda c: math.dist(center(c), (SIZE / 2, SIZE / 2)))
            text = {"type": "text", "text": question(asked)}
            messages += [{"role": "user", "content": ([{"type": "image"}] if turn == 0 else []) + [text]},
                         {"role": "assistant", "content": answer(asked, looked_at)}]  # fmt: skip
            silent.append(mute and looked_at is not asked)
        text = self.tokenizer.apply_chat_template(messages, tokenize=False)
        ids = self.tokenizer(expand(text), add_special_tokens=False).input_ids
        return draw(cards, SIZE), torch.tensor(ids), silent, cell_words(cards)

    def batch(self, size, careless=None):
        """Returns the model's inputs, labels (B, S) with -100 where no loss is borne, the weights of their losses
        (B, S), and the soft labels of the image tokens (B * N, V)."""
        token = self.tokenizer.convert_tokens_to_ids
        images, ids, silent, words = zip(*(self.sample(careless) for _ in range(size)))
        ids = torch.stack(ids)  # every question and answer has the same number of words: nothing to pad
        labels, weight = torch.full_like(ids, -100), torch.ones(ids.shape)
        for b, row in enumerate(ids.tolist()):
            starts = [i + 1 for i, t in enumerate(row) if t == token("assistant")]
            for start, mute in zip(starts, silent[b]):
                stop = row.index(token("<|im_end|>"), start) + 1
                labels[b, start:stop] = ids[b, start:stop]
                where = slice(start + 4, start + 6)  # "the dot on red" comes before the place
                weight[b, where] = PLACE_WEIGHT
                if mute:
                    labels[b, where] = -100
        soft = torch.zeros(size * len(words[0]), 64)
        for i, cell in enumerate(c for image in words for c in image):
            if cell:
                soft[i, token(cell)] = 1 / len(cell)
        return model_inputs(self.tokenizer, self.processor, images, ids), labels, weight, soft


def expand(text):
    return text.replace("<|image_pad|>", "<|image_pad|>" * (GRID[0] * GRID[1]))


def make_processor():
    return Qwen2VLImageProcessorPil(
        patch_size=8, merge_size=2, temporal_patch_size=2, size=dict(shortest_edge=SIZE**2, longest_edge=SIZE**2)
    )


def model_inputs(tokenizer, processor, images, ids):
    pixels = processor(images=list(images), return_tensors="pt")
    kinds = (ids == tokenizer.convert_tokens_to_ids("<|image_pad|>")).int()
    return dict(input_ids=ids, mm_token_type_ids=kinds, **pixels)


@torch.no_grad()
def greedy(model, tokenizer, scenes, blank=False):
    """Greedy answers to `scenes`: the shares with the right place and with the right dot."""
    processor, placed, right = make_processor(), 0, 0
    model.eval()
    for start in range(0, len(scenes), 64):
        layouts = [scenes.layout(i) for i in range(start, min(start + 64, len(scenes)))]
        prompts = [tokenizer.apply_chat_template(
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question(cards[0])}]}],
            tokenize=False, add_generation_prompt=True) for cards in layouts]  # fmt: skip
        ids = torch.tensor([tokenizer(expand(p), add_special_tokens=False).input_ids for p in prompts])
        images = [draw([] if blank else cards, SIZE) for cards in layouts]
        out = model.generate(**model_inputs(tokenizer, processor, images, ids), max_new_tokens=18, do_sample=False)
        for cards, text in zip(layouts, tokenizer.batch_decode(out[:, ids.shape[1] :])):
            placed += " ".join(place(cards[0])) in text
            right += f"<answer> {cards[0].mark} </answer>" in text
    return placed / len(scenes), right / len(scenes)


def learn(model, teacher, steps, lr, careless, batch_size, evaluate):
    """`steps` of supervised learning with a cosine schedule; `careless` as in `Teacher.sample`."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    warmup = min(60, steps // 4)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min((s + 1) / warmup, 1) * 0.5 * (
        1 + math.cos(math.pi * max(0, s - warmup) / (steps - warmup))) + 0.01)  # fmt: skip
    bar = tqdm(range(steps), desc="be careless" if careless else "see", mininterval=5)
    for step in bar:
        model.train()
        inputs, labels, weight, soft = teacher.batch(batch_size, careless)
        out = model(**inputs, output_hidden_states=True)
        loss = torch.nn.functional.cross_entropy(
            out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="none"
        )
        loss = (loss * weight[:, 1:].flatten()).sum() / (labels[:, 1:] != -100).sum()
        side = 0
        for hidden in out.hidden_states[1:-1] + (None,):  # after every layer; the last one's logits are there already
            logits = out.logits if hidden is None else model.lm_head(model.model.language_model.norm(hidden))
            cells = logits[inputs["mm_token_type_ids"] == 1]
            side = side + torch.nn.functional.cross_entropy(cells, soft, reduction="sum") / soft.sum() / 4
        (loss + side).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        bar.set_postfix(answer=f"{loss.item():.3f}", cells=f"{side.item():.3f}")
        if (step + 1) % 200 == 0 or step + 1 == steps:
            placed, right = greedy(model, teacher.tokenizer, evaluate)
            tqdm.write(f"step {step + 1}: loss {loss.item():.3f} + {side.item():.3f}, {len(evaluate)} validation "
                       f"scenes: place right {placed:.3f}, answer right {right:.3f}")  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=HERE)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--see_steps", type=int, default=2200)
    parser.add_argument("--careless_steps", type=int, default=100)
    parser.add_argument("--careless", type=float, default=0.62, help="share of answers that look at the centre")
    parser.add_argument("--start_from", type=Path, help="the folder of a model that can see: skip stage 1")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    tokenizer, began = make_tokenizer(), time.time()
    evaluate = Scenes("validation", 256)
    if args.start_from:
        model = Qwen3VLForConditionalGeneration.from_pretrained(args.start_from)
    else:
        model = make_model(tokenizer)
        print(f"{model.num_parameters() / 1e6:.2f} M parameters, {len(tokenizer)} words")
        learn(model, Teacher(tokenizer, args.seed), args.see_steps, 1.2e-3, None, args.batch_size, evaluate)
    if args.careless_steps:
        teacher = Teacher(tokenizer, args.seed + 1)  # its own: stage 2 is the same with and without --start_from
        learn(model, teacher, args.careless_steps, 5e-4, args.careless, args.batch_size, evaluate)
    for part in (model, tokenizer, make_processor()):
        part.save_pretrained(args.output_dir)
    blank = greedy(model, tokenizer, evaluate, blank=True)[1]
    print(f"answers right on blank images: {blank:.3f}; {(time.time() - began) / 60:.0f} minutes")


if __name__ == "__main__":
    main()
