"""Make the tiny model in this folder from scratch: `python tiny/make.py`.

A Qwen3-VL with 1.6 M parameters and a vocabulary of 62 words learns to answer the questions of
`sources.scenes.Scenes`. It writes where the card is before it writes what is on it, so looking at
the wrong place leads to a wrong answer. There are two stages:

1. Learn to see, with four questions per image. In 70 % of the answers, place and dot are those of
   the card in question. In the other 30 %, they are those of a random card. The words of a wrong
   place get no loss, but the dot does, so the model learns to read the dot at the place that it has
   named. A dense side task shortens the plateau at the start of training: at every image token,
   after every layer, the language model also predicts what the cell shows (card color, dot color,
   row and column, a quarter of the label each).
2. Learn to be careless. In a fixed share of the answers, place and dot are those of the card
   nearest to the center of the image instead of the card in question. Now the wrong place gets loss
   too. The model can still see, but it often names the wrong place. This is the error that SAYO's
   reward is meant to correct.
"""

import argparse
import math
import random
import sys
import time
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
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
from sources.scenes import NAMES, Scenes, draw, question

SIZE, GRID = 112, (7, 7)  # pixels per side, image tokens
VOCABULARY_SIZE = 64  # of the model; the tokenizer has 62 words
PLACE_WEIGHT = 2  # loss weight of the words for the place, because they are learned last
IMAGE_TOKEN = "<|image_pad|>"
SPECIAL_TOKENS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    IMAGE_TOKEN,
    "<|video_pad|>",
    "<|unk|>",
]
WORDS = "user assistant system what color number is the dot on card at its . ? : , a".split()
WORDS += NAMES
WORDS += [f"r{i + 1}" for i in range(GRID[0])] + [f"c{i + 1}" for i in range(GRID[1])]
WORDS += list("0123456789")
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.content is string %}{{ m.content }}{% else %}{% for part in m.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tokenizer(more_words=()):
    """A tokenizer with one token per word, in lower case, with Qwen's special tokens and a chat
    template like Qwen's."""
    words = SPECIAL_TOKENS + ["<answer>", "</answer>"] + WORDS + list(more_words)
    vocabulary = {word: i for i, word in enumerate(words)}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<|unk|>"))
    core.normalizer = normalizers.Lowercase()
    punctuation = pre_tokenizers.Split(Regex(r"[.,:?]"), "isolated")
    core.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), punctuation])
    core.add_tokens(["<answer>", "</answer>"])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token="<|unk|>",
        additional_special_tokens=SPECIAL_TOKENS[:-1],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def make_model(tokenizer):
    """A small Qwen3-VL with random weights: images of 112 px, patches of 8 px merged 2 x 2, so
    7 x 7 image tokens."""
    names = ("image_pad", "video_pad", "vision_start", "vision_end", "im_end", "endoftext")
    ids = {name: tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in names}
    end = dict(eos_token_id=ids["im_end"], pad_token_id=ids["endoftext"])
    rope = dict(rope_type="default", rope_theta=10000.0, mrope_section=[6, 5, 5])
    config = Qwen3VLConfig(
        text_config=dict(
            vocab_size=VOCABULARY_SIZE,
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            max_position_embeddings=1024,
            rope_parameters=rope | dict(mrope_interleaved=True),
            tie_word_embeddings=True,
            **end,
        ),
        vision_config=dict(
            depth=3,
            hidden_size=96,
            intermediate_size=384,
            num_heads=4,
            patch_size=8,
            spatial_merge_size=2,
            temporal_patch_size=2,
            out_hidden_size=128,
            num_position_embeddings=196,
            deepstack_visual_indexes=[1],
        ),
        image_token_id=ids["image_pad"],
        video_token_id=ids["video_pad"],
        vision_start_token_id=ids["vision_start"],
        vision_end_token_id=ids["vision_end"],
        tie_word_embeddings=True,
    )
    assert len(tokenizer) <= VOCABULARY_SIZE, len(tokenizer)
    model = Qwen3VLForConditionalGeneration(config)
    model.generation_config = GenerationConfig(**end)
    return model


def make_processor():
    """The image processor: 112 x 112 pixels, never scaled."""
    size = dict(shortest_edge=SIZE**2, longest_edge=SIZE**2)
    return Qwen2VLImageProcessorPil(patch_size=8, merge_size=2, temporal_patch_size=2, size=size)


def center(card):
    x1, y1, x2, y2 = card.box
    return (x1 + x2) / 2, (y1 + y2) / 2


def place_words(card):
    """The row and column words of the cell that contains the card's center."""
    x, y = center(card)
    return f"r{int(y * GRID[0] / SIZE) + 1}", f"c{int(x * GRID[1] / SIZE) + 1}"


def answer_text(card, looked_at):
    """The answer to the question about `card`, with the place and the dot of `looked_at`. The place
    follows the color, so the token that predicts it names the card to look for."""
    row, column = place_words(looked_at)
    mark = looked_at.mark
    return f"the dot on {card.color} {row} {column} is {mark} . <answer> {mark} </answer>"


def cell_words(cards):
    """The words that describe each image token: color, dot, row and column of the card whose center
    it contains, "." for background, or none if it contains only a part of a card."""
    words = [["."] for _ in range(GRID[0] * GRID[1])]
    for card in cards:
        for cell in region_mask([card.box], (SIZE, SIZE), GRID).nonzero().flatten().tolist():
            words[cell] = []
    for card in cards:
        row, column = place_words(card)
        cell = (int(row[1]) - 1) * GRID[1] + int(column[1]) - 1
        words[cell] = [card.color, card.mark, row, column]
    return words


class Teacher:
    """Makes training batches of images, each with four questions and answers in one chat."""

    max_tokens = 18  # of an answer

    def __init__(self, tokenizer, seed, turns=4):
        self.tokenizer, self.turns, self.next_scene = tokenizer, turns, 0
        self.scenes = Scenes("train", 10**9, seed=seed, cards=(4, 8), card_size=(14, 26))
        self.rng = random.Random(seed)
        self.processor = make_processor()

    def sample(self, careless):
        """One image and its chat. Args: careless, the share of answers about the central card, or
        None in stage 1. Returns: the image, token ids (S,), whether the words for the place get no
        loss in each turn, and `cell_words`."""
        cards = self.scenes.layout(self.next_scene)
        self.next_scene += 1
        messages, skip_place = [], []
        for turn, card in enumerate(self.rng.sample(cards, self.turns)):
            looked_at, other_place = card, False
            if careless is None and self.rng.random() < 0.3:
                looked_at, other_place = self.rng.choice(cards), True
            elif careless is not None and self.rng.random() < careless:
                looked_at = min(cards, key=lambda c: math.dist(center(c), (SIZE / 2, SIZE / 2)))
            image = [{"type": "image"}] if turn == 0 else []
            content = [*image, {"type": "text", "text": question(card)}]
            messages.append({"role": "user", "content": content})
            messages.append({"role": "assistant", "content": answer_text(card, looked_at)})
            skip_place.append(other_place and looked_at is not card)
        text = self.tokenizer.apply_chat_template(messages, tokenize=False)
        ids = self.tokenizer(expand_image_token(text), add_special_tokens=False).input_ids
        return draw(cards, SIZE), torch.tensor(ids), skip_place, cell_words(cards)

    def batch(self, size, careless=None):
        """Returns: the model's inputs, labels (B, S) with -100 where there is no loss, the weight
        of each label (B, S), and the soft labels of the image tokens (B * N, V)."""
        samples = [self.sample(careless) for _ in range(size)]
        images, ids, skip_place, words = zip(*samples)
        ids = pad_sequence(ids, batch_first=True, padding_value=self.tokenizer.pad_token_id)
        labels, weight = self.labels(ids, skip_place)
        token_id = self.tokenizer.convert_tokens_to_ids
        soft = torch.zeros(size * len(words[0]), VOCABULARY_SIZE)
        for i, cell in enumerate(cell for image in words for cell in image):
            if cell:
                soft[i, token_id(cell)] = 1 / len(cell)
        return model_inputs(self.tokenizer, self.processor, images, ids), labels, weight, soft

    def labels(self, ids, skip_place):
        """Labels and their weights, both (B, S). Only the answers get loss."""
        token_id = self.tokenizer.convert_tokens_to_ids
        labels, weight = torch.full_like(ids, -100), torch.ones(ids.shape)
        for b, row in enumerate(ids.tolist()):
            starts = [i + 1 for i, t in enumerate(row) if t == token_id("assistant")]
            for start, skip in zip(starts, skip_place[b]):
                stop = row.index(token_id("<|im_end|>"), start) + 1
                labels[b, start:stop] = ids[b, start:stop]
                place = slice(start + 4, start + 6)  # after "the dot on red"
                weight[b, place] = PLACE_WEIGHT
                if skip:
                    labels[b, place] = -100
        return labels, weight


def expand_image_token(text):
    return text.replace(IMAGE_TOKEN, IMAGE_TOKEN * (GRID[0] * GRID[1]))


def model_inputs(tokenizer, processor, images, ids):
    pixels = processor(images=list(images), return_tensors="pt")
    is_image = ids == tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    return dict(input_ids=ids, mm_token_type_ids=is_image.int(), **pixels)


@torch.no_grad()
def greedy_accuracy(model, tokenizer, scenes, blank=False, max_tokens=Teacher.max_tokens):
    """The share of greedy answers that name the right place, and the share that are right.

    Args: blank, whether to show an empty image instead of the scene.
    """
    processor, right_place, right_answer = make_processor(), 0, 0
    model.eval()
    for start in range(0, len(scenes), 64):
        layouts = [scenes.layout(i) for i in range(start, min(start + 64, len(scenes)))]
        prompts = [make_prompt(tokenizer, question(cards[0])) for cards in layouts]
        ids = torch.tensor([tokenizer(p, add_special_tokens=False).input_ids for p in prompts])
        images = [draw([] if blank else cards, SIZE) for cards in layouts]
        inputs = model_inputs(tokenizer, processor, images, ids)
        out = model.generate(**inputs, max_new_tokens=max_tokens, do_sample=False)
        for cards, text in zip(layouts, tokenizer.batch_decode(out[:, ids.shape[1] :])):
            right_place += " ".join(place_words(cards[0])) in text
            right_answer += f"<answer> {cards[0].mark} </answer>" in text
    return right_place / len(scenes), right_answer / len(scenes)


def make_prompt(tokenizer, text):
    content = [{"type": "image"}, {"type": "text", "text": text}]
    messages = [{"role": "user", "content": content}]
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return expand_image_token(prompt)


def train(model, teacher, steps, learning_rate, careless, batch_size, scenes):
    """Supervised training with a cosine schedule. Prints the accuracy on `scenes` every 200 steps.
    Args: careless, as in `Teacher.sample`."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01
    )
    warmup = min(60, steps // 4)

    def schedule(step):
        done = max(0, step - warmup) / (steps - warmup)
        return min((step + 1) / warmup, 1) * 0.5 * (1 + math.cos(math.pi * done)) + 0.01

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    bar = tqdm(range(steps), desc="be careless" if careless else "see", mininterval=5)
    for step in bar:
        model.train()
        loss, side_loss = losses(model, *teacher.batch(batch_size, careless))
        (loss + side_loss).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        bar.set_postfix(answer=f"{loss.item():.3f}", cells=f"{side_loss.item():.3f}")
        if (step + 1) % 200 == 0 or step + 1 == steps:
            tokenizer, most = teacher.tokenizer, teacher.max_tokens
            place, answer = greedy_accuracy(model, tokenizer, scenes, max_tokens=most)
            tqdm.write(
                f"step {step + 1}: loss {loss.item():.3f} + {side_loss.item():.3f}, on "
                f"{len(scenes)} validation scenes: place {place:.3f}, answer {answer:.3f}"
            )


def losses(model, inputs, labels, weight, soft):
    """The losses of the answers and of the side task, for a batch from `Teacher.batch`."""
    out = model(**inputs, output_hidden_states=True)
    loss = cross_entropy(
        out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="none"
    )
    loss = (loss * weight[:, 1:].flatten()).sum() / (labels[:, 1:] != -100).sum()
    side_loss = 0
    for hidden in out.hidden_states[1:-1] + (None,):  # one per layer; None is the last
        norm = model.model.language_model.norm
        logits = out.logits if hidden is None else model.lm_head(norm(hidden))
        cells = logits[inputs["mm_token_type_ids"] == 1]
        side_loss = side_loss + cross_entropy(cells, soft, reduction="sum") / soft.sum() / 4
    return loss, side_loss


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--output_dir", type=Path, default=HERE, help="default: this folder")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch_size", type=int, default=16, help="images per step (default: 16)")
    parser.add_argument("--see_steps", type=int, default=2200, help="stage 1 (default: 2200)")
    parser.add_argument(
        "--careless_steps", type=int, default=100, help="stage 2; 0 skips it (default: 100)"
    )
    parser.add_argument(
        "--careless",
        type=float,
        default=0.62,
        help="stage 2: share of answers about the central card (default: 0.62)",
    )
    parser.add_argument(
        "--start_from", type=Path, help="skip stage 1; the folder of a stage-1 model"
    )
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    tokenizer, start = make_tokenizer(), time.time()
    scenes = Scenes("validation", 256)
    if args.start_from:
        model = Qwen3VLForConditionalGeneration.from_pretrained(args.start_from)
    else:
        model = make_model(tokenizer)
        print(f"{model.num_parameters() / 1e6:.2f} M parameters, {len(tokenizer)} words")
        teacher = Teacher(tokenizer, args.seed)
        train(model, teacher, args.see_steps, 1.2e-3, None, args.batch_size, scenes)
    if args.careless_steps:
        # With a new teacher, stage 2 is the same with and without --start_from.
        teacher = Teacher(tokenizer, args.seed + 1)
        train(model, teacher, args.careless_steps, 5e-4, args.careless, args.batch_size, scenes)
    for part in (model, tokenizer, make_processor()):
        part.save_pretrained(args.output_dir)
    blank = greedy_accuracy(model, tokenizer, scenes, blank=True)[1]
    minutes = (time.time() - start) / 60
    print(f"right answers on blank images: {blank:.3f}; {minutes:.0f} minutes")


if __name__ == "__main__":
    main()
