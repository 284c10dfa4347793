"""Train the model in tiny/ from random weights: `python study/make_tiny.py --output_dir tiny`.

A Qwen3-VL with 1.6 M parameters and a vocabulary of 63 words learns to answer the questions of
`scenes.Scenes`. Its configuration and its tokenizer are the files in tiny/. It looks at one card
after the other. For each look it writes a place, r5 c5 for row 5, column 5 of the image tokens, and
a color. Then it looks again, or it answers with the dot that it sees at the last place:

    look r5 c5 : white . look r1 c5 : orange . dot blue . <answer> blue </answer>

docs/tiny_world.md explains the three stages. All have four questions per image. In the side task
of every stage, each image token also predicts, after every layer, what its cell shows: card color,
dot color, row and column, a quarter of the label each.
"""

import argparse
import math
import random
import re
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
from model import Completions, load_vlm
from scenes import Scenes, draw, question
from study.common import ROOT

TINY = ROOT / "tiny"
SIZE, GRID = 112, (7, 7)  # pixels per side; image tokens
IMAGES, TURNS = 16, 4  # images per step, questions per image
WARMUP = 60  # steps
MAX_TOKENS = 34  # of an answer; four looks have 31
PLACE_WEIGHT = 2  # loss weight of the words for the place, because they are learned last
ATTENTION_WEIGHT = 0.5  # loss weight of the attention at the words for the row
LOOK_AGAIN = 0.25  # share of the careless answers that look again after a wrong first look
VOCABULARY = 64  # of the model; the tokenizer has 63 words
IMAGE_TOKEN = "<|image_pad|>"


# --- what it learns ---


def place_of(card):
    """The image token with a card's center: "r4 c3" is row 4, column 3, counted from 1."""
    x1, y1, x2, y2 = card.box
    side = SIZE // GRID[0]
    return f"r{(y1 + y2) // 2 // side + 1} c{(x1 + x2) // 2 // side + 1}"


def look_text(card):
    return f"look {place_of(card)} : {card.color} ."


def answer_text(looks):
    """An answer that looks at the cards `looks`, in order."""
    mark = looks[-1].mark
    return f"{' '.join(map(look_text, looks))} dot {mark} . <answer> {mark} </answer>"


def answer_weights(looks, card, careless):
    """The loss weight of each token of an answer to the question about `card`, the end of turn
    included. Unless it is careless, wrong places and the decision to answer after one have none."""
    weights = []
    for look in looks:
        place = PLACE_WEIGHT if careless or look is card else 0
        weights += [1, place, place, 1, 1, 1]  # look r5 c5 : white .
    decision = int(careless or looks[-1] is card)
    return weights + [decision, 1, 1, 1, 1, 1, 1]  # dot blue . <answer> blue </answer> <|im_end|>


def short_answer(look, card):
    """An answer of stage 1 about `card` that looks at the card `look`, and its loss weights."""
    mark, place = look.mark, PLACE_WEIGHT if look is card else 0
    text = f"the dot on {card.color} {place_of(look)} is {mark} . <answer> {mark} </answer>"
    return text, [1, 1, 1, 1, place, place, 1, 1, 1, 1, 1, 1, 1]


def cell_words(cards):
    """The words that describe each image token: color, dot, row and column of the card whose center
    it contains, "." for background, or none if it contains only a part of a card."""
    covered = region_mask([card.box for card in cards], (SIZE, SIZE), GRID)
    words = [[] if part else ["."] for part in covered]
    for card in cards:
        words[cell_of(card)] = [card.color, card.mark, *place_of(card).split()]
    return words


def cell_of(card):
    """The index of the image token that contains the center of a card."""
    row, column = (int(word[1]) - 1 for word in place_of(card).split())
    return row * GRID[1] + column


class Teacher:
    """Makes training batches of images, each with four questions and answers in one chat."""

    def __init__(self, stage, seed):
        self.stage, self.seed = stage, seed
        self.tokenizer = AutoTokenizer.from_pretrained(TINY)
        self.processor = AutoImageProcessor.from_pretrained(TINY, backend="pil")
        self.scenes = Scenes("train", 10**9, seed=seed, cards=(4, 8), card_size=(14, 26))

    def answer(self, rng, cards, card):
        """An answer to the question about `card`. Returns: its text, the weights of its loss, and
        the cards that the attention should look at, one after the other."""
        others = [other for other in cards if other is not card]
        if self.stage == "see":
            look = card if rng.random() < 0.7 else rng.choice(cards)
            return *short_answer(look, card), []
        if self.stage == "look again":
            wrong = rng.sample(others, rng.choices(range(4), (4, 3, 2, 1))[0])
            looks = wrong if wrong and rng.random() < 0.3 else [*wrong, card]
        else:
            first = next((other for other in cards if other.color == "white"), card)
            again = first is not card and rng.random() < LOOK_AGAIN
            looks = [first, card] if again else [first]
        careless = self.stage == "be careless"
        return answer_text(looks), answer_weights(looks, card, careless), looks if careless else []

    def chat(self, rng, cards):
        """Returns: token ids (S,), their loss weights (S,), labels of the side task (S, V), and at
        each word for a row the index of the image token to look at (S,), elsewhere -1."""
        messages, answers = [], []
        for number, card in enumerate(rng.sample(cards, TURNS)):
            image = [{"type": "image"}] if number == 0 else []
            content = [*image, {"type": "text", "text": question(card)}]
            answers.append(self.answer(rng, cards, card))
            messages.append({"role": "user", "content": content})
            messages.append({"role": "assistant", "content": answers[-1][0]})
        text = self.tokenizer.apply_chat_template(messages, tokenize=False)
        text = text.replace(IMAGE_TOKEN, IMAGE_TOKEN * (GRID[0] * GRID[1]))
        ids = self.tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids[0]
        weights, soft = torch.zeros(len(ids)), torch.zeros(len(ids), VOCABULARY)
        cells = torch.full((len(ids),), -1)
        token_id = self.tokenizer.convert_tokens_to_ids
        for position, words in zip((ids == token_id(IMAGE_TOKEN)).nonzero(), cell_words(cards)):
            soft[position, token_id(words)] = 1 / max(1, len(words))
        starts = (ids == token_id("assistant")).nonzero().flatten() + 1
        for start, (_, answer, looks) in zip(starts.tolist(), answers):
            weights[start : start + len(answer)] = torch.tensor(answer).float()
            for i, look in enumerate(looks):
                cells[start + 6 * i + 1] = cell_of(look)  # at the word for the row
        return ids, weights, soft, cells

    def batch(self, step):
        """The batch of a step. Returns: the model's inputs, the loss weight of each token (B, S),
        and the soft labels of the side task (B, S, V), 0 at tokens without one."""
        rng, images, chats = random.Random(f"{self.seed} {step}"), [], []
        for i in range(IMAGES):
            cards = self.scenes.layout(step * IMAGES + i)
            images.append(draw(cards, SIZE))
            chats.append(self.chat(rng, cards))
        *parts, cells = zip(*chats)
        ids, weights, soft = (pad_sequence(part, batch_first=True) for part in parts)
        cells = pad_sequence(cells, batch_first=True, padding_value=-1)
        is_image = (ids == self.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)).int()
        pixels = self.processor(images=images, return_tensors="pt")
        return dict(input_ids=ids, mm_token_type_ids=is_image, **pixels), weights, soft, cells


# --- training ---


def losses(model, inputs, weights, soft, cells):
    """The losses of the answers, the side task and the last layer's attention, for a batch from
    `Teacher.batch`."""
    looks = (cells >= 0).any().item()  # only in the last stage
    out = model(**inputs, output_hidden_states=True, output_attentions=looks)
    targets, weights = inputs["input_ids"][:, 1:].flatten(), weights[:, 1:].flatten()
    loss = cross_entropy(out.logits[:, :-1].flatten(0, 1), targets, reduction="none")
    loss = (loss * weights).sum() / (weights > 0).sum()
    side_loss, norm, labeled = 0, model.model.language_model.norm, soft.sum(-1) > 0
    layers = [model.lm_head(norm(hidden[labeled])) for hidden in out.hidden_states[1:-1]]
    for logits in [*layers, out.logits[labeled]]:
        loss_of_layer = cross_entropy(logits, soft[labeled], reduction="sum") / soft.sum()
        side_loss = side_loss + loss_of_layer / 4
    look_loss = attention_loss(out.attentions[-1], inputs, cells) if looks else 0.0
    return loss, side_loss, ATTENTION_WEIGHT * look_loss


def attention_loss(attention, inputs, cells):
    """Minus the mean log share of the right image token in the attention to the image, a mean over
    heads (B, H, S, S), at the tokens that have one."""
    batch, tokens = (cells >= 0).nonzero().T
    first_image_token = inputs["mm_token_type_ids"].argmax(1)  # (B,)
    rows = attention.mean(1)[batch, tokens]  # (n, S)
    columns = first_image_token[batch, None] + torch.arange(GRID[0] * GRID[1])  # (n, N)
    shares = rows.gather(1, columns)
    shares = shares / shares.sum(1, keepdim=True)
    return -shares[torch.arange(len(shares)), cells[batch, tokens]].log().mean()


def train(model, teacher, steps, learning_rate):
    """Supervised training with a cosine schedule."""
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.01)
    model.train()
    for step in (bar := tqdm(range(steps), desc=teacher.stage, mininterval=9)):
        done = max(0, step - WARMUP) / (steps - WARMUP)
        cosine = 0.5 * (1 + math.cos(math.pi * done)) + 0.01
        optimizer.param_groups[0]["lr"] = learning_rate * min((step + 1) / WARMUP, 1) * cosine
        loss, side_loss, look_loss = losses(model, *teacher.batch(step))
        (loss + side_loss + look_loss).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        parts = dict(answer=loss, side=side_loss, look=look_loss)
        bar.set_postfix({name: f"{float(x):.3f}" for name, x in parts.items()}, refresh=False)


# --- is the model as intended? ---


CRITERIA = {  # the smallest and the largest share that is wanted
    "first look on the card in question": (0, 0.35),
    "wrong first looks corrected": (0, 0.02),
    "groups that agree whether the first look is on the card": (0.95, 1),
    "samples that look again after a wrong first look": (0.15, 0.4),
    "dots read at a forced place": (0.95, 1),
    "right answers to a blank image": (0, 0.12),
}


def looks_of(text, card):
    """Whether the card touches each cell that an answer names, in order."""
    region = region_mask([card.box], (SIZE, SIZE), GRID).view(GRID)
    places = re.findall(r"\br(\d) c(\d)", text)
    return [region[int(row) - 1, int(column) - 1].item() for row, column in places] or [False]


@torch.no_grad()
def grade(folder):
    """Measure CRITERIA on 256 validation scenes, in NF4 as in the default run.

    Greedy answers; groups of 8 samples; answers that are forced to look at one of the cards, which
    should then give the dot there a probability above one half; greedy answers to an image without
    cards. Returns: the share of right answers, and {criterion: share}.
    """
    vlm, scenes = load_vlm(folder, device="cpu"), Scenes("validation", 256)
    layouts = [scenes.layout(i) for i in range(len(scenes))]
    prompts = [vlm.encode(scene.image, scene.question) for scene in scenes]
    blank = [vlm.encode(draw([], SIZE), scene.question) for scene in scenes]
    right = []
    for questions in (blank, prompts):
        greedy = [answer.texts[0] for answer in vlm.sample_groups(questions, 1, MAX_TOKENS, 0)]
        right.append([f"<answer> {x.answer} </answer>" in text for x, text in zip(scenes, greedy)])
    looks = [looks_of(text, cards[0]) for text, cards in zip(greedy, layouts)]
    groups = vlm.sample_groups(prompts, 8, MAX_TOKENS, generator=torch.Generator().manual_seed(0))
    groups = [[looks_of(text, cards[0]) for text in g.texts] for g, cards in zip(groups, layouts)]
    read = []
    for prompt, cards in zip(prompts, layouts):
        texts = [f"{look_text(card)} dot {card.mark}" for card in cards]  # 8 tokens each
        ids = vlm.tokenizer(texts, return_tensors="pt").input_ids
        forced = Completions(ids, torch.ones_like(ids).bool())
        logps = vlm.score(prompt, forced, attention=False).logps  # (cards, 8)
        read += (logps[:, -1].exp() > 0.5).tolist()
    values = [
        [look[0] for look in looks],
        [look[-1] for look in looks if not look[0]],
        [len({look[0] for look in group}) == 1 for group in groups],
        [len(look) > 1 for group in groups for look in group if not look[0]],
        read,
        right[0],
    ]
    shares = {name: sum(v) / max(1, len(v)) for name, v in zip(CRITERIA, values)}
    return sum(right[1]) / len(scenes), shares


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--output_dir", type=Path, required=True, help="tiny/ replaces the model")
    folder = parser.parse_args().output_dir
    torch.manual_seed(0)
    model = Qwen3VLForConditionalGeneration(AutoConfig.from_pretrained(TINY))
    model.generation_config = GenerationConfig.from_pretrained(TINY)
    stages = ("see", 2200, 1.2e-3), ("look again", 1200, 1e-3), ("be careless", 500, 5e-4)
    for seed, (stage, steps, learning_rate) in enumerate(stages):
        teacher = Teacher(stage, seed)
        if stage == "be careless":
            model.set_attn_implementation("eager")  # which returns the attention, for its loss
        train(model, teacher, steps, learning_rate)
    for part in (model, teacher.tokenizer, teacher.processor):
        part.save_pretrained(folder)
    right, shares = grade(folder)
    print(f"{'right answers':58}{right:.3f}")
    for name, share in shares.items():
        low, high = CRITERIA[name]
        print(f"{name:58}{share:.3f}  wanted: {low} to {high}")


if __name__ == "__main__":
    main()
