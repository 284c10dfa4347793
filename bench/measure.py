"""What `ablation.py` measures of one trained model, on test scenes that nothing else uses. All of it is for the tiny
world, whose prompts are equally long and whose answers name a place: "the dot on red r3 c5 is blue . <answer> ..."."""

import sys
from dataclasses import replace
from pathlib import Path
from statistics import fmean as mean

import torch
from PIL import ImageDraw
from torch.nn.utils.rnn import pad_sequence

sys.path.insert(0, str(Path(__file__).parent.parent))
import reward as R
from data import Example, example_region
from model import Completions, Vlm
from sayo_mini import Group, judge, step_metrics
from scenes import BACKGROUND, Scenes, draw, question
from tiny.make import SIZE, answer, center, place

TEST = {"split": "test", "seed": 7}  # the default run is judged on seed 0, choices are made on "validation"
HARDER = {
    "10 cards": {"cards": (10, 10)},
    "small cards": {"card_size": (10, 12)},
    "unseen pairs": {"unseen_pairs": True},
    "border": {},  # the card asked for lies in the outermost ring of cells
}
SIZES = {"accuracy": 1000, "sampled": 1000, "harder": 100, "gaze": 200, "causal": 60, "groups": 32}
VARIANTS = SIZES | {"sampled": 0, "harder": 0, "causal": 0, "groups": 0}  # 0: not measured
QUICK = {"accuracy": 200, "sampled": 200, "harder": 50, "gaze": 50, "causal": 25, "groups": 8}
PLACE_AND_DOT = [4, 5, 7]  # of the words of a right answer: row, column, dot
DIAGNOSTICS = ("frac_reward_zero_std", "entropy", "kl", "completions/mean_length", "completions/repeated_sentences",
               "completions/seq_rep_3", "completions/unclosed_tags", "attention/corr_accuracy",
               "attention/corr_length", "rewards/attention/std", "rewards/format/std",
               "rewards/accuracy/std")  # fmt: skip


def questions(count, **style):
    """`count` (example, card asked for); of the border, if `style` says border=True."""
    border, cell = style.pop("border", False), SIZE / 7
    scenes, found = Scenes(count=100 * count, **(TEST | style)), []
    for i in range(len(scenes)):
        cards = scenes.layout(i)
        if not border or not all(cell <= v < SIZE - cell for v in center(cards[0])):
            image, name = draw(cards, SIZE), f"test-{scenes.seed}-{i}"
            found.append((Example(image, question(cards[0]), cards[0].mark, [cards[0].box], name), cards[0]))
        if len(found) == count:
            return found


@torch.no_grad()
def write(vlm: Vlm, examples, max_tokens, sample=False, batch=100):
    """One answer to each example through the library's own `generate`, many examples at a time; greedy, or drawn from
    torch's global generator. Returns: a list of Completions of one answer each."""
    out = []
    vlm.model.eval()
    for start in range(0, len(examples), batch):
        prompts = [vlm.encode(e.image, e.question) for e in examples[start : start + batch]]
        ids = torch.stack([p.input_ids for p in prompts])  # (B, P)
        how = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0} if sample else {"do_sample": False}
        written = vlm.model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids),
            mm_token_type_ids=(ids == vlm.core.config.image_token_id).int(),
            pixel_values=torch.cat([p.pixel_values for p in prompts]),
            image_grid_thw=torch.cat([p.image_grid_thw for p in prompts]),
            max_new_tokens=max_tokens, suppress_tokens=vlm.placeholders, **how,
        )[:, ids.shape[1]:]  # fmt: skip
        for row in written:
            stops = torch.isin(row, vlm.stop_ids).nonzero()
            row = row[: stops[0, 0] + 1] if len(stops) else row
            text = vlm.tokenizer.decode(row, skip_special_tokens=True)
            out.append(Completions(row[None], torch.ones(1, len(row), dtype=torch.bool), [text]))
    return out


def right(vlm, asked, max_tokens, sample=False):
    """The answers to `asked`, whether they are right, and whether they name the right place."""
    examples, cards = zip(*asked)
    answers = write(vlm, examples, max_tokens, sample)
    correct = [R.accuracy_reward(a.texts[0], e.answer) for a, e in zip(answers, examples)]
    placed = [float(" ".join(place(card)) in a.texts[0]) for a, card in zip(answers, cards)]
    return answers, correct, placed


@torch.no_grad()
def gaze(vlm, asked, answers, cfg, alignment, layers, heads):
    """Localisation by one ruler, whatever was rewarded: on the model's own text, at its most uncertain tokens; and on
    the right answer as fixed text, at the words for row, column and dot. Both also against the next question's box."""
    usual, (vlm.layers, vlm.heads) = (vlm.layers, vlm.heads), (layers, heads)
    rows, regions = [], [example_region(example, (7, 7)) for example, _ in asked]
    for i, ((example, card), own) in enumerate(zip(asked, answers)):
        prompt = vlm.encode(example.image, example.question)
        fixed = teach(vlm, card)
        ids = pad_sequence([own.ids[0], fixed.ids[0]], batch_first=True)
        mask = pad_sequence([own.mask[0], fixed.mask[0]], batch_first=True)
        scores = vlm.score(prompt, Completions(ids, mask))  # (2, C): its own text and the fixed one
        selected = R.select_tokens(scores.entropy, mask, cfg.token_fraction)
        selected[1] = False
        selected[1, PLACE_AND_DOT] = True
        attention = R.align_attention(scores.attention, scores.prompt_attention, alignment)  # (2, C, N)
        row, other = {}, regions[(i + 1) % len(regions)]
        for name, rows_of, chosen in zip(("", "fixed_"), attention, selected):
            map = rows_of[chosen].mean(0)  # (N,)
            row |= {name + key: value for key, value in R.localization(map, regions[i]).items()}
            row[f"{name}permuted_auroc"] = R.localization(map, other)["auroc"]
        rows.append(row)
    vlm.layers, vlm.heads = usual
    return {name: mean(row[name] for row in rows) for name in rows[0]}


def teach(vlm, card):
    """The right answer as the model's text."""
    text = answer(card, card) + vlm.tokenizer.eos_token
    ids = vlm.tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
    return Completions(ids, torch.ones_like(ids, dtype=torch.bool), [text])


@torch.no_grad()
def causal(vlm, asked, scenes):
    """log p of the whole right answer, in nats: on the image, with the card asked for painted over, and with another
    place of the same size, one that holds another card, painted over instead."""
    logps = {"logp_whole": [], "logp_target_blank": [], "logp_elsewhere_blank": []}
    for (example, card), cards in zip(asked, scenes):
        elsewhere = [shift(card.box, other) for other in cards[1:]]
        elsewhere = next(box for box in elsewhere if apart(box, card.box))
        for name, box in zip(logps, (None, card.box, elsewhere)):
            image = example.image.copy()
            if box:
                x1, y1, x2, y2 = box
                ImageDraw.Draw(image).rectangle((x1, y1, x2 - 1, y2 - 1), fill=BACKGROUND)
            prompt = vlm.encode(image, example.question)
            logps[name].append(vlm.score(prompt, teach(vlm, card), attention=False).logps.sum().item())
    return {name: mean(values) for name, values in logps.items()}


def shift(box, other):
    """`box`, moved onto the card `other` and back inside the image."""
    half = (box[2] - box[0]) / 2
    x, y = (round(min(max(v - half, 0), SIZE - 2 * half)) for v in center(other))
    return x, y, x + box[2] - box[0], y + box[3] - box[1]


def apart(a, b):
    return a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]


def diagnose(vlm, asked, cfg):
    """What metrics.jsonl would say of this policy, with the true rewards whatever it was trained on: G samples each."""
    generator, groups, stats = torch.Generator(vlm.device).manual_seed(0), [], []
    for example, _ in asked:
        prompt = vlm.encode(example.image, example.question)
        sampled = vlm.sample(prompt, cfg.num_generations, cfg.max_completion_length, 1.0, generator)
        group = Group(example, prompt, sampled)
        judge(vlm, group, replace(cfg, beta=0), with_gradient=False)
        with torch.no_grad():
            ref_logps = vlm.score(prompt, group.completions, attention=False, reference=True).logps
        mask = group.completions.mask
        _, stat = R.grpo_loss(group.old_logps, group.old_logps, ref_logps, group.advantages, mask)
        stats.append(stat | {"loss": 0.0, "tokens": mask.sum().item()})
        groups.append(group)
    row = step_metrics(groups, [{"stats": stats, "grad_norm": 0.0, "finite": True}])
    return {name: row[name] for name in DIAGNOSTICS}


def measure(vlm, cfg, sizes, telling):
    """Everything, as one flat dict of floats. `cfg`: the reward, lengths and G that all arms share. Two rulers: the
    paper's (last layer, all heads, query) and that of `telling`, the head whose gaze best tells right from wrong."""
    torch.manual_seed(0)
    asked, tokens = questions(sizes["accuracy"]), cfg.max_completion_length
    answers, correct, placed = right(vlm, asked, tokens)
    out = {"accuracy": mean(correct), "place": mean(placed)}
    out["right_if_placed"] = mean(c for c, p in zip(correct, placed) if p) if any(placed) else 0.0
    out["right_if_not_placed"] = mean(c for c, p in zip(correct, placed) if not p) if not all(placed) else 0.0
    if sizes["sampled"]:
        out["sampled_accuracy"] = mean(right(vlm, asked[: sizes["sampled"]], tokens, sample=True)[1])
    for name, style in HARDER.items() if sizes["harder"] else ():
        harder = questions(sizes["harder"], border=name == "border", **style)
        out[f"accuracy, {name}"] = mean(right(vlm, harder, tokens)[1])
    looked = asked[: sizes["gaze"]]
    out |= gaze(vlm, looked, answers, cfg, "query", vlm.layers, vlm.heads)
    ruler = telling["alignment"], [telling["layers"]], [telling["heads"]]
    out |= {f"telling_{name}": value for name, value in gaze(vlm, looked, answers, cfg, *ruler).items()}
    if sizes["causal"]:
        layouts = Scenes(count=sizes["causal"], **TEST)
        out |= causal(vlm, asked[: sizes["causal"]], [layouts.layout(i) for i in range(len(layouts))])
    return out | (diagnose(vlm, asked[: sizes["groups"]], cfg) if sizes["groups"] else {})
