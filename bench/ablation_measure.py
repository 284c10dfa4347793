"""The measurements of `ablation.py` on one trained model, with test scenes that nothing else uses.

They rely on properties of the tiny world: all prompts have the same length, and answers name a
place, as in "the dot on red r3 c5 is blue . <answer> blue </answer>".
"""

from dataclasses import replace
from statistics import fmean as mean

import torch
from PIL import ImageDraw
from torch.nn.utils.rnn import pad_sequence

import reward
from analysis.metrics import step_metrics
from data import Example, example_region
from model import Completions
from sayo_mini import score_and_reward
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
SIZES = dict(accuracy=1000, sampled=1000, harder=100, attention=200, causal=60, groups=32)
VARIANT_SIZES = SIZES | dict(sampled=0, harder=0, causal=0, groups=0)
QUICK_SIZES = dict(accuracy=200, sampled=200, harder=50, attention=50, causal=25, groups=8)
PLACE_AND_DOT = [4, 5, 7]  # words of a ground-truth answer: row, column, dot
DIAGNOSTICS = (  # metrics of metrics.jsonl
    "frac_reward_zero_std",
    "entropy",
    "kl",
    "completions/mean_length",
    "completions/repeated_sentences",
    "completions/seq_rep_3",
    "completions/unclosed_tags",
    "attention/corr_accuracy",
    "attention/corr_length",
    "rewards/attention/std",
    "rewards/format/std",
    "rewards/accuracy/std",
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


@torch.no_grad()
def generate_answers(vlm, examples, max_tokens, sample=False, batch=100):
    """Answer each example once with transformers' `generate`, in batches.

    Args: sample, whether to sample at temperature 1, with torch's global generator, instead of
    decoding greedily.
    Returns: a list of Completions, each of one answer.
    """
    answers = []
    how = {"do_sample": False}
    if sample:
        how = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    vlm.model.eval()
    for start in range(0, len(examples), batch):
        prompts = [vlm.encode(e.image, e.question) for e in examples[start : start + batch]]
        ids = torch.stack([p.input_ids for p in prompts])  # (B, P)
        rows = vlm.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            mm_token_type_ids=(ids == vlm.core.config.image_token_id).int(),
            pixel_values=torch.cat([p.pixel_values for p in prompts]),
            image_grid_thw=torch.cat([p.image_grid_thw for p in prompts]),
            max_new_tokens=max_tokens,
            suppress_tokens=vlm.placeholders,
            **how,
        )
        for row in rows[:, ids.shape[1] :]:
            stops = torch.isin(row, vlm.stop_ids).nonzero()
            row = row[: stops[0, 0] + 1] if len(stops) else row
            text = vlm.tokenizer.decode(row, skip_special_tokens=True)
            mask = torch.ones(1, len(row), dtype=torch.bool)
            answers.append(Completions(row[None], mask, [text]))
    return answers


def grade_answers(vlm, questions, max_tokens, sample=False):
    """Answer and grade. Returns: the answers, and two lists of 0.0 or 1.0: whether each answer is
    right, and whether it names the right place."""
    examples, cards = zip(*questions)
    answers = generate_answers(vlm, examples, max_tokens, sample)
    texts = [answer.texts[0] for answer in answers]
    correct = [reward.accuracy_reward(text, e.answer) for text, e in zip(texts, examples)]
    places = [" ".join(place_words(card)) for card in cards]
    return answers, correct, [float(place in text) for text, place in zip(texts, places)]


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
    """Metrics of metrics.jsonl for this policy, from G samples per question and the true rewards,
    regardless of the rewards in training."""
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
    return {name: row[name] for name in DIAGNOSTICS}


def measure(vlm, cfg, sizes, head):
    """Measure everything. Returns: a flat dict of floats.

    Attention is measured in two ways: as in the paper (last layer, all heads, query), and in the
    single head whose AUROC differs most between right and wrong answers of the untrained model
    (`discriminative_head_...`).

    Args: cfg, the settings that all arms share; sizes, see SIZES; head, from
    `ablation_arms.discriminative_head`.
    """
    torch.manual_seed(0)
    questions, max_tokens = make_questions(sizes["accuracy"]), cfg.max_completion_length
    answers, correct, right_place = grade_answers(vlm, questions, max_tokens)
    at_right = [c for c, right in zip(correct, right_place) if right]
    at_wrong = [c for c, right in zip(correct, right_place) if not right]
    results = {
        "accuracy": mean(correct),
        "right_place": mean(right_place),
        "accuracy_if_right_place": mean(at_right) if at_right else 0.0,
        "accuracy_if_wrong_place": mean(at_wrong) if at_wrong else 0.0,
    }
    if sizes["sampled"]:
        sampled = grade_answers(vlm, questions[: sizes["sampled"]], max_tokens, sample=True)
        results["sampled_accuracy"] = mean(sampled[1])
    for name, style in HARDER.items() if sizes["harder"] else ():
        harder = make_questions(sizes["harder"], **style)
        results[f"accuracy, {name}"] = mean(grade_answers(vlm, harder, max_tokens)[1])
    inputs = vlm, questions[: sizes["attention"]], answers, cfg
    results |= measure_attention(*inputs, "query", vlm.layers, vlm.heads)
    by_head = measure_attention(*inputs, head["alignment"], [head["layers"]], [head["heads"]])
    results |= {f"discriminative_head_{name}": value for name, value in by_head.items()}
    if sizes["causal"]:
        scenes = Scenes(count=sizes["causal"], **TEST)
        layouts = [scenes.layout(i) for i in range(len(scenes))]
        results |= measure_covering(vlm, questions[: sizes["causal"]], layouts)
    if sizes["groups"]:
        results |= training_diagnostics(vlm, questions[: sizes["groups"]], cfg)
    return results
