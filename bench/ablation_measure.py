"""The measurements of `ablation.py` on one trained model, with test scenes that nothing else uses.

They rely on properties of the tiny world: answers name a place, as in "the dot on red r3 c5 is
blue . <answer> blue </answer>", and a word is a token.
"""

from dataclasses import replace
from statistics import fmean as mean

import torch
from PIL import ImageDraw
from torch.nn.utils.rnn import pad_sequence

import reward
from analysis.evaluate import attention_maps
from analysis.metrics import step_metrics
from bench.ablation_arms import named_cells
from data import Example, example_region
from model import Completions
from sayo_mini import score_and_reward
from sources.packing import split_by_tokens
from sources.scenes import BACKGROUND, Scenes, draw, question
from tiny.make import GRID, SIZE, answer_text, center, place_words

TEST = {"split": "test", "seed": 7}  # the default run uses seed 0
HARDER = {  # name -> settings of make_questions
    "10 cards": {"cards": (10, 10)},
    "small cards": {"card_size": (10, 12)},
    "unseen pairs": {"unseen_pairs": True},
    "border": {"border": True},
}
# Test scenes per measurement; 0: not measured.
SIZES = dict(accuracy=1000, sampled=200, harder=100, attention=200, causal=60, groups=32)
SMALL_SIZES = SIZES | dict(sampled=0, harder=0, causal=0, groups=0)
QUICK_SIZES = dict(accuracy=100, sampled=100, harder=20, attention=30, causal=10, groups=4)
WORDS = {"color": 3, "row": 4, "column": 5, "is": 6, "dot": 7}  # positions in a ground-truth answer
PLACE_AND_DOT = [WORDS[name] for name in ("row", "column", "dot")]
DIAGNOSTICS = (  # metrics of metrics.jsonl
    "entropy",
    "kl",
    "completions/mean_length",
    "completions/seq_rep_3",
    "completions/unclosed_tags",
    "attention/corr_accuracy",
    "rewards/attention/mean",
    "rewards/attention/std",
    "rewards/format/mean",
)


def make_questions(count, border=False, **style):
    """Make `count` test questions, as (Example, its Card).

    Args: border, ask only about cards in the outermost ring of cells; style, settings of Scenes.
    """
    scenes, cell = Scenes(count=100 * count, **(TEST | style)), SIZE / GRID[0]
    questions = []
    for i in range(len(scenes)):
        cards = scenes.layout(i)
        if not border or not all(cell <= v < SIZE - cell for v in center(cards[0])):
            image, name = draw(cards, SIZE), f"test-{scenes.seed}-{i}"
            boxes = [cards[0].box]
            example = Example(image, question(cards[0]), cards[0].mark, boxes, name)
            questions.append((example, cards[0]))
        if len(questions) == count:
            return questions


def validation_questions(count):
    """Make `count` validation questions, as (Example, its Card)."""
    scenes = Scenes("validation", count)
    return [(scenes[i], scenes.layout(i)[0]) for i in range(count)]


def answer_questions(vlm, prompts, max_tokens, temperature=0.0):
    """Answer each prompt once. Returns: a list of Completions, each of one answer."""
    generator, answers = torch.Generator(vlm.device).manual_seed(0), []
    for batch in split_by_tokens(prompts, lambda prompt: len(prompt.input_ids) + max_tokens):
        answers += vlm.sample_groups(batch, 1, max_tokens, temperature, generator)
    return answers


def grade_answers(questions, answers):
    """Grade answers. Returns: means, a dict of floats. A place counts as right if it is the cell of
    the card's center (`right_place`), or any cell that the card overlaps (`on_card`)."""
    rows = []
    for (example, card), answer in zip(questions, answers):
        text = answer.texts[0]
        region, cells = example_region(example, GRID).view(GRID), named_cells(text)[:1]
        inside = [0 <= r < GRID[0] and 0 <= c < GRID[1] and bool(region[r, c]) for r, c in cells]
        rows.append(
            {
                "accuracy": reward.accuracy_reward(text, example.answer),
                "right_place": float(" ".join(place_words(card)) in text),
                "on_card": float(any(inside)),
                "full_sentence": float(text.startswith("the dot on ") and " is " in text),
            }
        )
    results = {name: mean(row[name] for row in rows) for name in rows[0]}
    for place in ("right_place", "on_card"):
        for value, name in ((1.0, f"accuracy_if_{place}"), (0.0, f"accuracy_if_not_{place}")):
            kept = [row["accuracy"] for row in rows if row[place] == value]
            results[name] = mean(kept) if kept else 0.0
    return results


def grade_looks(questions, answers):
    """`grade_answers`, and the places that an answer names one after the other: how often the first
    and the last are on the card, how many answers of each combination are right, and the share of
    wrong first looks that are corrected."""
    rows = []
    for (example, _), answer in zip(questions, answers):
        region, cells = example_region(example, GRID).view(GRID), named_cells(answer.texts[0])
        on = [r < GRID[0] and c < GRID[1] and bool(region[r, c]) for r, c in cells] or [False]
        right = reward.accuracy_reward(answer.texts[0], example.answer) == 1
        rows.append((on[0], on[-1], len(on) > 1, right))
    first, last, again, right = torch.tensor(rows).T

    def share(condition, within=torch.tensor(True)):
        kept = condition[within.expand(len(condition))].float()
        return kept.mean().item() if len(kept) else 0.0

    results = {
        "first_on_card": share(first),
        "last_on_card": share(last),
        "looked_again": share(again),
        "looked_again_if_first_off": share(again, ~first),
        "corrected": share(last & right, ~first),
        "first_off_if_wrong": share(~first, ~right),
    }
    for a, was in ((first, "on"), (~first, "off")):
        for b, ends in ((last, "on"), (~last, "off")):
            results[f"named_{was}_{ends}"] = share(a & b)
            results[f"accuracy_named_{was}_{ends}"] = share(right, a & b)
    return grade_answers(questions, answers) | results


class LearningCurve:
    """The same questions, answered again and again during training.
    Args: questions, (Example, Card) pairs; grade, `grade_answers` or `grade_looks`."""

    def __init__(self, questions, grade=grade_answers):
        self.questions, self.grade, self.prompts = questions, grade, None

    def point(self, vlm, cfg):
        """Returns: what `grade` measures."""
        if self.prompts is None:  # the vision tower is frozen, so its features are kept
            self.prompts = [vlm.encode(e.image, e.question) for e, _ in self.questions]
        answers = answer_questions(vlm, self.prompts, cfg.max_completion_length)
        return self.grade(self.questions, answers)


def measure_looks_world(vlm, cfg, count):
    """The measurements of a model that can look twice: greedy answers to test questions, their
    attention, and how often sampled answers look again. Returns: a flat dict of floats."""
    questions, length = make_questions(count), cfg.max_completion_length
    prompts = [vlm.encode(e.image, e.question) for e, _ in questions]
    answers = answer_questions(vlm, prompts, length)
    results = grade_looks(questions, answers)
    results["auroc"] = mean(own_text_auroc(vlm, questions, prompts, answers, cfg))
    sampled = answer_questions(vlm, prompts, length, temperature=1.0)
    graded = grade_looks(questions, sampled)
    kept = ("accuracy", "looked_again", "looked_again_if_first_off", "corrected")
    return results | {f"sampled_{name}": graded[name] for name in kept}


@torch.no_grad()
def own_text_auroc(vlm, questions, prompts, answers, cfg):
    """AUROC of the mean map of the selected tokens, one number per answer."""
    pairs, scores = list(zip(prompts, answers)), []
    length = cfg.max_completion_length
    for batch in split_by_tokens(pairs, lambda pair: len(pair[0].input_ids) + length):
        scores += vlm.score_groups(*zip(*batch))
    for (example, _), answer, score in zip(questions, answers, scores):
        selected = reward.select_tokens(score.entropy, answer.mask, cfg.token_fraction)
        rows = reward.align_attention(score.attention, score.prompt_attention, cfg.alignment)
        map = rows[0][selected[0]].mean(0)  # (N,)
        yield reward.localization(map, example_region(example, GRID))["auroc"]


# --- attention ---


@torch.no_grad()
def measure_attention(vlm, questions, answers, cfg, alignment, layers, heads):
    """Measure how well the attention finds the region, in the same way for all arms.

    It is measured on the model's own answers, at their highest-entropy tokens, and on the
    ground-truth answers (`ground_truth_...`), at their words for row, column and dot. Both are also
    compared with the region of the next question (`permuted_auroc`).
    Returns: means over the questions, a dict of floats.
    """
    saved, (vlm.layers, vlm.heads) = (vlm.layers, vlm.heads), (layers, heads)
    rows, regions = [], [example_region(example, GRID) for example, _ in questions]
    for i, ((example, card), own) in enumerate(zip(questions, answers)):
        prompt = vlm.encode(example.image, example.question)
        truth = ground_truth_answer(vlm, card)
        ids = pad_sequence([own.ids[0], truth.ids[0]], batch_first=True)
        mask = pad_sequence([own.mask[0], truth.mask[0]], batch_first=True)
        scores = vlm.score(prompt, Completions(ids, mask))  # (2, C): own and ground-truth text
        selected = reward.select_tokens(scores.entropy, mask, cfg.token_fraction)
        selected[1] = False
        selected[1, PLACE_AND_DOT] = True
        attention = reward.align_attention(scores.attention, scores.prompt_attention, alignment)
        row, next_region = {}, regions[(i + 1) % len(regions)]
        for prefix, tokens, chosen in zip(("", "ground_truth_"), attention, selected):
            map = tokens[chosen].mean(0)  # (N,)
            localization = reward.localization(map, regions[i])
            row |= {f"{prefix}{name}": value for name, value in localization.items()}
            row[f"{prefix}permuted_auroc"] = reward.localization(map, next_region)["auroc"]
        rows.append(row)
    vlm.layers, vlm.heads = saved
    return {name: mean(row[name] for row in rows) for name in rows[0]}


def ground_truth_answer(vlm, card):
    """The right answer as Completions, as if the model had written it."""
    text = answer_text(card, card) + vlm.tokenizer.eos_token
    ids = vlm.tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
    return Completions(ids, torch.ones_like(ids, dtype=torch.bool), [text])


# --- where single heads look ---


@torch.no_grad()
def head_hits(vlm, questions, answers):
    """Whether the most attended cell lies in the region, for every head and word of an answer.

    Returns: (questions, L, H, words) of 0 or 1, for the words of WORDS in order; NaN if an answer
    is too short; and (questions,) whether the answers are right.
    """
    hits = []
    for (example, _), answer in zip(questions, answers):
        prompt = vlm.encode(example.image, example.question)
        maps, _ = attention_maps(vlm, prompt, answer)  # (L, H, 1, C, N)
        inside = example_region(example, GRID)[maps[:, :, 0].argmax(-1)].float()  # (L, H, C)
        short = inside.shape[-1] <= max(WORDS.values())
        words = inside[..., list(WORDS.values())] if not short else None
        hits.append(torch.full((*inside.shape[:2], len(WORDS)), torch.nan) if short else words)
    right = [reward.accuracy_reward(a.texts[0], e.answer) for (e, _), a in zip(questions, answers)]
    return torch.stack(hits), torch.tensor(right)


def choose_look_heads(vlm, cfg, count):
    """The heads whose most attended cell is most often in the region, for right answers to
    validation questions: one at the color word, before any place is written, and one at a word
    after the place. Returns: {"early": [layer, head, word], "late": the same}."""
    questions = validation_questions(count)
    prompts = [vlm.encode(e.image, e.question) for e, _ in questions]
    answers = answer_questions(vlm, prompts, cfg.max_completion_length)
    hits, right = head_hits(vlm, questions, answers)
    hits, names = hits[right.bool()].nanmean(0), list(WORDS)  # (L, H, words)
    chosen = {}
    for look, words in (("early", ["color"]), ("late", ["column", "is", "dot"])):
        shares = hits[..., [names.index(word) for word in words]]
        layer, head, word = (i.item() for i in torch.unravel_index(shares.argmax(), shares.shape))
        chosen[look] = [layer, head, words[word]]
    return chosen


def measure_looks(vlm, questions, answers, look_heads):
    """How often the early and the late look find the region, and how accurate the answers are.
    Args: look_heads, from `choose_look_heads`. Returns: a dict of floats."""
    hits, right = head_hits(vlm, questions, answers)
    words, looks = list(WORDS), {}
    for name, (layer, head, word) in look_heads.items():
        looks[name] = hits[:, layer, head, words.index(word)]
    known, right = ~looks["early"].isnan(), right.bool()
    early, late = (look.nan_to_num(0).bool() & known for look in looks.values())
    results = {"early_look": early[known].float().mean().item() if known.any() else 0.0}
    for value, name in ((right, "right"), (~right, "wrong")):
        kept = early[known & value].float()
        results[f"early_look_if_{name}"] = kept.mean().item() if len(kept) else 0.0
    for first, a in ((early, "on"), (~early & known, "off")):
        for last, b in ((late, "on"), (~late & known, "off")):
            both = first & last
            results[f"looks_{a}_{b}"] = both.float().mean().item()
            results[f"accuracy_looks_{a}_{b}"] = right[both].float().mean().nan_to_num(0).item()
    return results


# --- causes ---


@torch.no_grad()
def measure_covering(vlm, questions, layouts):
    """log p of the ground-truth answer, in nats: with the original image, with the card in question
    covered, and with an equal area around a different card covered.

    Args: layouts, the cards of each scene, the card in question first.
    """
    logps = {"logp_original": [], "logp_target_covered": [], "logp_other_covered": []}
    for (example, card), cards in zip(questions, layouts):
        candidates = (move_to_card(card.box, other) for other in cards[1:])
        other_box = next(box for box in candidates if disjoint(box, card.box))
        for name, box in zip(logps, (None, card.box, other_box)):
            image = example.image.copy()
            if box:
                x1, y1, x2, y2 = box
                pen = ImageDraw.Draw(image)
                pen.rectangle((x1, y1, x2 - 1, y2 - 1), fill=BACKGROUND)
            prompt, truth = vlm.encode(image, example.question), ground_truth_answer(vlm, card)
            logps[name].append(vlm.score(prompt, truth, attention=False).logps.sum().item())
    return {name: mean(values) for name, values in logps.items()}


def move_to_card(box, card):
    """The box, centered on a card and moved back into the image if needed."""
    side = box[2] - box[0]
    x, y = (round(min(max(v - side / 2, 0), SIZE - side)) for v in center(card))
    return x, y, x + side, y + box[3] - box[1]


def disjoint(a, b):
    return a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]


def training_diagnostics(vlm, questions, cfg):
    """Metrics of metrics.jsonl for this policy, from G samples per question and the unmodified
    rewards, regardless of the rewards in training; and how much of the variance of r_v within a
    group is explained by the row, and by the cell, that a completion names."""
    cfg = replace(cfg, beta=0)  # the reference is computed below, also for equal rewards
    generator, groups, losses = torch.Generator(vlm.device).manual_seed(0), [], []
    for example, _ in questions:
        prompt = vlm.encode(example.image, example.question)
        settings = cfg.num_generations, cfg.max_completion_length, 1.0, generator
        completions = vlm.sample(prompt, *settings)
        with torch.no_grad():
            (group,), _ = score_and_reward(vlm, [(example, prompt, completions)], cfg)
            ref_logps = vlm.score(prompt, completions, attention=False, reference=True).logps
        logps, mask = group.old_logps, completions.mask
        _, stats = reward.grpo_loss(logps, logps, ref_logps, group.advantages, mask)
        losses.append(stats | {"loss": 0.0, "tokens": mask.sum().item()})
        groups.append(group)
    row = step_metrics(groups, [{"losses": losses, "grad_norm": 0.0, "finite": True}])
    row = {name: row[name] for name in DIAGNOSTICS}
    for name, length in (("row", 1), ("cell", 2)):
        row[f"r_v_explained_by_{name}"] = explained_variance(groups, length)
    return row


def explained_variance(groups, length):
    """R^2 within groups: of r_v, by the first `length` coordinates of the named place."""
    total = rest = 0.0
    for group in groups:
        by_place = {}
        values = group.rewards["attention"]
        for text, value in zip(group.completions.texts, values.tolist()):
            place = tuple(cell[:length] for cell in named_cells(text)[:1])
            by_place.setdefault(place, []).append(value)
        total += (values - values.mean()).square().sum().item()
        rest += sum((v - mean(same)) ** 2 for same in by_place.values() for v in same)
    return 1 - rest / total if total else 0.0


def measure(vlm, cfg, sizes, heads):
    """Measure everything. Returns: a flat dict of floats.

    Attention is measured in two ways: as in the paper (last layer, all heads, query), and in the
    single head whose AUROC differs most between right and wrong answers of the untrained model
    (`discriminative_head_...`).

    Args: cfg, the settings that all arms share; sizes, see SIZES; heads, the discriminative head
    and the heads of `choose_look_heads`.
    """
    questions, max_tokens = make_questions(sizes["accuracy"]), cfg.max_completion_length
    prompts = [vlm.encode(example.image, example.question) for example, _ in questions]
    answers = answer_questions(vlm, prompts, max_tokens)
    results = grade_answers(questions, answers)
    if sizes["sampled"]:
        count = sizes["sampled"]
        sampled = answer_questions(vlm, prompts[:count], max_tokens, temperature=1.0)
        results["sampled_accuracy"] = grade_answers(questions[:count], sampled)["accuracy"]
    for name, style in HARDER.items() if sizes["harder"] else ():
        harder = make_questions(sizes["harder"], **style)
        encoded = [vlm.encode(example.image, example.question) for example, _ in harder]
        graded = grade_answers(harder, answer_questions(vlm, encoded, max_tokens))
        results[f"accuracy, {name}"] = graded["accuracy"]
    inputs = vlm, questions[: sizes["attention"]], answers
    results |= measure_attention(*inputs, cfg, "query", vlm.layers, vlm.heads)
    single = heads["discriminative"]
    place = single["alignment"], [single["layers"]], [single["heads"]]
    by_head = measure_attention(*inputs, cfg, *place)
    results |= {f"discriminative_head_{name}": value for name, value in by_head.items()}
    results |= measure_looks(*inputs, heads["looks"])
    if sizes["causal"]:
        scenes = Scenes(count=sizes["causal"], **TEST)
        layouts = [scenes.layout(i) for i in range(len(scenes))]
        results |= measure_covering(vlm, questions[: sizes["causal"]], layouts)
    if sizes["groups"]:
        results |= training_diagnostics(vlm, questions[: sizes["groups"]], cfg)
    return results
