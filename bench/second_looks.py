"""Make a model that can look twice, and rarely does: `python bench/second_looks.py`.

It starts from the tiny model and learns to look at one card after another:

    look r4 c3 : white . look r1 c5 : orange . dot blue . <answer> blue </answer>

After each look, it says which card it sees there, and looks again or answers. The stages are those
of tiny/make.py:

1. Learn to see and to look again, with up to three wrong looks before the right one. The words of a
   wrong place get no loss. What is there does, and so does the decision to look again. In 30 % of
   the answers with wrong looks, the dot is that of the last wrong card, so that the model learns to
   read the dot at the place that it has named.
2. Learn to be careless. In 80 % of the answers, the first look is at the card nearest to the center
   of the image. If that is not the card in question, 35 % of the answers look again. The others
   answer with what they see.
"""

import argparse
import math
import sys
import time
from pathlib import Path

import torch
from transformers import Qwen3VLForConditionalGeneration

sys.path.insert(0, str(Path(__file__).parent.parent))
from sources.scenes import Scenes, draw, question
from tiny.make import (
    HERE,
    PLACE_WEIGHT,
    SIZE,
    Teacher,
    cell_words,
    center,
    expand_image_token,
    greedy_accuracy,
    make_processor,
    make_prompt,
    make_tokenizer,
    model_inputs,
    place_words,
    train,
)

MODEL = Path("runs/second_looks/model")
WORDS_PER_LOOK = 6  # look r4 c3 : white .
MOST_LOOKS = 4
CARELESS, LOOK_AGAIN = 0.8, 0.35
CRITERIA = ("accuracy", "first_off_if_wrong", "corrected", "looked_again_if_first_off")
MAX_TOKENS = 34  # of an answer; four looks have 31
SETTINGS = {  # of the runs with this model; the others are those of the tiny model
    "model_name_or_path": str(MODEL),
    "max_completion_length": MAX_TOKENS,
    "format_lengths": "10,31",
}


def look_text(card):
    return f"look {' '.join(place_words(card))} : {card.color} ."


def answer_text(looks):
    """An answer with the cards `looks`, in order, and the dot of the last."""
    mark = looks[-1].mark
    return f"{' '.join(map(look_text, looks))} dot {mark} . <answer> {mark} </answer>"


class ChainTeacher(Teacher):
    """Makes training batches of answers with several looks."""

    max_tokens = MAX_TOKENS

    def looks(self, cards, card, careless):
        """The cards of one answer about `card`, in order. Args: careless, None in stage 1."""
        others = [other for other in cards if other is not card]
        if careless is None:
            (wrong,) = self.rng.choices(range(MOST_LOOKS), (4, 3, 2, 1))
            looks = self.rng.sample(others, wrong)
            return looks if looks and self.rng.random() < 0.3 else [*looks, card]
        if self.rng.random() >= careless:
            return [card]
        first = min(cards, key=lambda c: math.dist(center(c), (SIZE / 2, SIZE / 2)))
        again = first is not card and self.rng.random() < LOOK_AGAIN
        return [first, card] if again else [first]

    def sample(self, careless):
        """One image and its chat. Returns: the image, token ids (S,), per turn the words of the
        answer that get no loss and those of places, and `cell_words`."""
        cards = self.scenes.layout(self.next_scene)
        self.next_scene += 1
        messages, marked = [], []
        for turn, card in enumerate(self.rng.sample(cards, self.turns)):
            looks = self.looks(cards, card, careless)
            image = [{"type": "image"}] if turn == 0 else []
            content = [*image, {"type": "text", "text": question(card)}]
            messages.append({"role": "user", "content": content})
            messages.append({"role": "assistant", "content": answer_text(looks)})
            starts = range(0, WORDS_PER_LOOK * len(looks), WORDS_PER_LOOK)
            skipped = [s + i for s, look in zip(starts, looks) if look is not card for i in (1, 2)]
            if looks[-1] is not card:  # nor does the decision to answer
                skipped.append(WORDS_PER_LOOK * len(looks))
            places = [s + i for s in starts for i in (1, 2)]
            marked.append((skipped if careless is None else [], places))
        text = self.tokenizer.apply_chat_template(messages, tokenize=False)
        ids = self.tokenizer(expand_image_token(text), add_special_tokens=False).input_ids
        return draw(cards, SIZE), torch.tensor(ids), marked, cell_words(cards)

    def labels(self, ids, marked):
        """Labels and their weights, both (B, S). Only the answers get loss."""
        token_id = self.tokenizer.convert_tokens_to_ids
        labels, weight = torch.full_like(ids, -100), torch.ones(ids.shape)
        for b, row in enumerate(ids.tolist()):
            starts = [i + 1 for i, t in enumerate(row) if t == token_id("assistant")]
            for start, (skipped, places) in zip(starts, marked[b]):
                stop = row.index(token_id("<|im_end|>"), start) + 1
                labels[b, start:stop] = ids[b, start:stop]
                labels[b, [start + i for i in skipped]] = -100
                weight[b, [start + i for i in places]] = PLACE_WEIGHT
        return labels, weight


# --- is the model as intended? ---


@torch.no_grad()
def predict_words(model, tokenizer, scenes, text_of):
    """The most likely next word after a forced start of an answer, one per scene.
    Args: text_of, the start of the answer for the cards of a scene, with one length for all."""
    layouts = [scenes.layout(i) for i in range(len(scenes))]
    texts = [make_prompt(tokenizer, question(cards[0])) + text_of(cards) for cards in layouts]
    ids = torch.tensor([tokenizer(text, add_special_tokens=False).input_ids for text in texts])
    images = [draw(cards, SIZE) for cards in layouts]
    words = []
    for start in range(0, len(ids), 64):
        part = slice(start, start + 64)
        inputs = model_inputs(tokenizer, make_processor(), images[part], ids[part])
        best = model(**inputs).logits[:, -1].argmax(-1)
        words += tokenizer.convert_ids_to_tokens(best.tolist())
    return words


def forced_reading(model, tokenizer, scenes):
    """The share of forced looks at another card after which the model says what is there, and does
    what it should. Returns: a dict of floats."""
    model.eval()
    inputs, layouts = (model, tokenizer, scenes), [scenes.layout(i) for i in range(len(scenes))]
    colors = predict_words(*inputs, lambda cards: look_text(cards[1]).split(":")[0] + ":")
    decisions = predict_words(*inputs, lambda cards: look_text(cards[1]))
    dots = predict_words(*inputs, lambda cards: look_text(cards[1]) + " dot")
    n = len(layouts)
    return {
        "color of the forced place": sum(w == c[1].color for w, c in zip(colors, layouts)) / n,
        "color in question instead": sum(w == c[0].color for w, c in zip(colors, layouts)) / n,
        "looks again": decisions.count("look") / n,
        "dot of the forced place": sum(w == c[1].mark for w, c in zip(dots, layouts)) / n,
        "dot in question instead": sum(w == c[0].mark for w, c in zip(dots, layouts)) / n,
    }


def measure_criteria(folder, count=256):
    """Greedy and sampled answers to validation questions, graded by `grade_looks`, in NF4 as in the
    runs. Returns: a dict of floats."""
    from bench import ablation_measure  # here, because it imports this module
    from model import load_vlm

    vlm = load_vlm(str(folder), device="cpu")
    questions = ablation_measure.validation_questions(count)
    prompts = [vlm.encode(example.image, example.question) for example, _ in questions]
    results = {}
    for name, temperature in (("greedy", 0.0), ("samples", 1.0)):
        answers = ablation_measure.answer_questions(vlm, prompts, MAX_TOKENS, temperature)
        graded = ablation_measure.grade_looks(questions, answers)
        results |= {f"{name}: {metric}": graded[metric] for metric in CRITERIA}
    return results


def main(arguments=None):
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("--output_dir", type=Path, default=MODEL, help=f"default: {MODEL}")
    add("--start_from", type=Path, help="skip stage 1; the folder of a stage-1 model")
    args = parser.parse_args(arguments)
    torch.manual_seed(0)
    tokenizer, start = make_tokenizer(["look"]), time.time()
    scenes = Scenes("validation", 256)
    source = args.start_from or HERE
    model = Qwen3VLForConditionalGeneration.from_pretrained(source, dtype=torch.float32)
    stages = [(100, 5e-4, CARELESS, args.output_dir)]  # steps, learning rate
    if not args.start_from:
        see = args.output_dir.with_name(args.output_dir.name + "_stage_1")
        stages.insert(0, (1200, 1e-3, None, see))
    for seed, (steps, rate, careless, folder) in enumerate(stages, 2 - len(stages)):
        teacher = ChainTeacher(tokenizer, seed)
        train(model, teacher, steps, rate, careless, 16, scenes)
        for part in (model, tokenizer, make_processor()):
            part.save_pretrained(folder)
        for name, share in forced_reading(model, tokenizer, scenes).items():
            print(f"forced look: {name} {share:.3f}", flush=True)
    blank = greedy_accuracy(model, tokenizer, scenes, True, MAX_TOKENS)[1]
    for name, value in measure_criteria(args.output_dir).items():
        print(f"{name} {value:.3f}")
    minutes = (time.time() - start) / 60
    print(f"right answers on blank images: {blank:.3f}; {minutes:.0f} minutes")


if __name__ == "__main__":
    main()
