"""Train the model in tiny/ from random weights: `python study/make_tiny.py --output_dir tiny`.

A Qwen3-VL with 1.6 M parameters and a vocabulary of 62 words learns to answer the questions of
`scenes.Scenes`. Its configuration and its tokenizer are the files in tiny/. It writes where the
card is before it writes what is on it, so looking at the wrong place leads to a wrong answer. There
are two stages:

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
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoTokenizer,
    GenerationConfig,
    Qwen3VLForConditionalGeneration,
)

sys.path.insert(0, str(Path(__file__).parent.parent))
from data import region_mask
from model import load_vlm
from scenes import Scenes, draw, question
from study.common import ROOT

TINY = ROOT / "tiny"
SIZE, GRID = 112, (7, 7)  # pixels per side; image tokens
IMAGES, TURNS = 16, 4  # images per step, questions per image
MAX_TOKENS = 18  # of an answer
CARELESS = 0.62  # share of the answers of stage 2 that are about the central card
PLACE_WEIGHT = 2  # loss weight of the words for the place, because they are learned last
VOCABULARY = 64  # of the model; the tokenizer has 62 words
IMAGE_TOKEN = "<|image_pad|>"


# --- what it learns ---


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
    covered = region_mask([card.box for card in cards], (SIZE, SIZE), GRID)
    words = [[] if part else ["."] for part in covered]
    for card in cards:
        row, column = place_words(card)
        cell = (int(row[1]) - 1) * GRID[1] + int(column[1]) - 1
        words[cell] = [card.color, card.mark, row, column]
    return words


class Teacher:
    """Makes training batches of images, each with four questions and answers in one chat."""

    def __init__(self, seed, careless):
        self.careless, self.next_scene = careless, 0
        self.tokenizer = AutoTokenizer.from_pretrained(TINY)
        self.scenes = Scenes("train", 10**9, seed=seed, cards=(4, 8), card_size=(14, 26))
        self.processor = AutoImageProcessor.from_pretrained(TINY, backend="pil")
        self.rng = random.Random(seed)

    def sample(self):
        """One image and its chat. Returns: the image, token ids (S,), whether the words for the
        place get no loss in each turn, and `cell_words`."""
        cards = self.scenes.layout(self.next_scene)
        self.next_scene += 1
        messages, skip_place = [], []
        for turn, card in enumerate(self.rng.sample(cards, TURNS)):
            looked_at, other_place = card, False
            if not self.careless and self.rng.random() < 0.3:
                looked_at, other_place = self.rng.choice(cards), True
            elif self.careless and self.rng.random() < CARELESS:
                looked_at = min(cards, key=lambda c: math.dist(center(c), (SIZE / 2, SIZE / 2)))
            image = [{"type": "image"}] if turn == 0 else []
            content = [*image, {"type": "text", "text": question(card)}]
            messages.append({"role": "user", "content": content})
            messages.append({"role": "assistant", "content": answer_text(card, looked_at)})
            skip_place.append(other_place and looked_at is not card)
        text = self.tokenizer.apply_chat_template(messages, tokenize=False)
        text = text.replace(IMAGE_TOKEN, IMAGE_TOKEN * (GRID[0] * GRID[1]))
        ids = self.tokenizer(text, add_special_tokens=False).input_ids
        return draw(cards, SIZE), torch.tensor(ids), skip_place, cell_words(cards)

    def batch(self, size):
        """Returns: the model's inputs, labels (B, S) with -100 where there is no loss, the weight
        of each label (B, S), and the soft labels of the image tokens (B * N, V)."""
        images, ids, skip_place, words = zip(*(self.sample() for _ in range(size)))
        ids = pad_sequence(ids, batch_first=True, padding_value=self.tokenizer.pad_token_id)
        token_id = self.tokenizer.convert_tokens_to_ids
        labels, weight = torch.full_like(ids, -100), torch.ones(ids.shape)
        for b, row in enumerate(ids.tolist()):
            starts = [i + 1 for i, t in enumerate(row) if t == token_id("assistant")]
            for start, skip in zip(starts, skip_place[b]):
                stop = row.index(token_id("<|im_end|>"), start) + 1
                labels[b, start:stop] = ids[b, start:stop]  # only the answers get loss
                place = slice(start + 4, start + 6)  # after "the dot on red"
                weight[b, place] = PLACE_WEIGHT
                if skip:
                    labels[b, place] = -100
        soft = torch.zeros(size * GRID[0] * GRID[1], VOCABULARY)
        for i, cell in enumerate(cell for image in words for cell in image):
            if cell:
                soft[i, token_id(cell)] = 1 / len(cell)
        pixels = self.processor(images=list(images), return_tensors="pt")
        is_image = (ids == token_id(IMAGE_TOKEN)).int()
        inputs = dict(input_ids=ids, mm_token_type_ids=is_image, **pixels)
        return inputs, labels, weight, soft


# --- training ---


def losses(model, inputs, labels, weight, soft):
    """The losses of the answers and of the side task, for a batch from `Teacher.batch`."""
    out = model(**inputs, output_hidden_states=True)
    loss = cross_entropy(
        out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="none"
    )
    loss = (loss * weight[:, 1:].flatten()).sum() / (labels[:, 1:] != -100).sum()
    side_loss, norm = 0, model.model.language_model.norm
    layers = [model.lm_head(norm(hidden)) for hidden in out.hidden_states[1:-1]] + [out.logits]
    for logits in layers:
        cells = logits[inputs["mm_token_type_ids"] == 1]
        side_loss = side_loss + cross_entropy(cells, soft, reduction="sum") / soft.sum() / 4
    return loss, side_loss


def train(model, teacher, steps, learning_rate):
    """Supervised training with a cosine schedule."""
    model.train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01
    )
    warmup = max(1, min(60, steps // 4))

    def schedule(step):
        done = max(0, step - warmup) / (steps - warmup)
        return min((step + 1) / warmup, 1) * 0.5 * (1 + math.cos(math.pi * done)) + 0.01

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    bar = tqdm(range(steps), desc="be careless" if teacher.careless else "see")
    for _ in bar:
        loss, side_loss = losses(model, *teacher.batch(IMAGES))
        (loss + side_loss).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        bar.set_postfix(answer=f"{loss.item():.3f}", cells=f"{side_loss.item():.3f}")


def grade(folder):
    """The shares of greedy answers to 256 validation scenes that name the right place, and that
    are right."""
    vlm, scenes = load_vlm(folder, load_in_4bit=False, device="cpu"), Scenes("validation", 256)
    prompts = [vlm.encode(scene.image, scene.question) for scene in scenes]
    answers = vlm.sample_groups(prompts, 1, MAX_TOKENS, temperature=0)
    right_place, right_answer = 0, 0
    for i, answer in enumerate(answers):
        card = scenes.layout(i)[0]
        right_place += " ".join(place_words(card)) in answer.texts[0]
        right_answer += f"<answer> {card.mark} </answer>" in answer.texts[0]
    return right_place / len(scenes), right_answer / len(scenes)


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--output_dir", type=Path, required=True, help="tiny/ replaces the model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--see_steps", type=int, default=2200, help="stage 1 (default: 2200)")
    parser.add_argument("--careless_steps", type=int, default=100, help="stage 2 (default: 100)")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    model = Qwen3VLForConditionalGeneration(AutoConfig.from_pretrained(TINY))
    model.generation_config = GenerationConfig.from_pretrained(TINY)
    stages = [("see", args.see_steps, 1.2e-3), ("be careless", args.careless_steps, 5e-4)]
    for number, (name, steps, learning_rate) in enumerate(stages):
        teacher = Teacher(args.seed + number, careless=name == "be careless")
        train(model, teacher, steps, learning_rate)
        for part in (model, teacher.tokenizer, teacher.processor):
            part.save_pretrained(args.output_dir)
        place, answer = grade(args.output_dir)
        print(f"after learning to {name}: right place {place:.3f}, right answer {answer:.3f}")


if __name__ == "__main__":
    main()
