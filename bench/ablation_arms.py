"""The arms of `ablation.py`: rewards as flags of sayo_mini.py, and controls as patches of it.

A control replaces one function of the program during its run; see docs/evidence.md.
"""

import random
import re
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from unittest.mock import patch

import torch

import reward
import sayo_mini
from bench import second_looks
from bench.ablation_loss import attention_loss
from bench.doc_tables import ROOT
from commands.probe import best_layer_and_heads, most_discriminative_head, probe
from sources.scenes import NAMES, Scenes

# The paper's values of the settings that the preset of the tiny model changes.
PAPER = {"alignment": "query", "layers": "-1", "heads": "all"}
COMMON_FLAGS = ["--model_name_or_path", str(ROOT / "tiny"), "--device", "cpu"]
COMMON_FLAGS += ["--eval_examples", "0"]
COMMON_FLAGS += [part for name, value in PAPER.items() for part in (f"--{name}", value)]

SAYO = "attention + format (SAYO)"
BOTH = "attention + accuracy + format"
ACCURACY = "accuracy + format"
FORMAT = "format only"
LENGTH = "length only"
ROLLED_BOX = "placebo A: rolled box"
SHUFFLED_SCORES = "placebo B: scores shuffled within the group"
CENTERED_BOX = "control: centered box"
ALL_CARDS = "control: boxes of all cards"
PLACE = "place named + format (text only)"
LOSS = "attention loss + format"
LOSS_FASTER = "attention loss + format, rate 2e-4"  # the best rate for answers moves no attention
LOSS_AND_ACCURACY = "attention loss + accuracy + format"
BOTH_SLOWER = "attention + accuracy + format, rate 4e-4"  # SAYO's rate
ACCURACY_SLOWER = "accuracy + format, rate 4e-4"
LOWEST_ENTROPY = "lowest-entropy 30 % of tokens"


@dataclass(frozen=True)
class Arm:
    """A way to train. `change(seed)` returns the context in which it trains; `rate` is its learning
    rate, by default that of the arm `rate_of`, by default its own best one."""

    flags: list[str]
    change: Callable = lambda seed: nullcontext()
    rate_of: str = ""
    rate: float = 0.0


def weight_flags(**weights):
    weights = {"attention": 0, "format": 1, "accuracy": 0} | weights
    return ["--reward_weights", ",".join(f"{name}={weight}" for name, weight in weights.items())]


# --- placebos ---


def roll_box():
    """Placebo A: move the region by half the image in both directions, wrapping around at the
    edges. Its area is the same, but its place is wrong."""
    true_region = sayo_mini.example_region

    def rolled_region(example, grid):
        shift = grid[0] // 2, grid[1] // 2
        return true_region(example, grid).view(grid).roll(shift, (0, 1)).flatten()

    return patch.object(sayo_mini, "example_region", rolled_region)


def shuffle_scores(seed):
    """Placebo B: shuffle the true attention rewards among the completions of a group. Their mean
    and standard deviation are kept but carry no information."""
    true_reward, generator = reward.attention_reward, torch.Generator().manual_seed(seed)

    def shuffled_reward(*args):
        scores = true_reward(*args)
        return scores[torch.randperm(len(scores), generator=generator)]

    return patch.object(reward, "attention_reward", shuffled_reward)


def reward_length():
    """Replace the format reward by one for length alone, tokens / 18."""

    def length_reward(text, n_tokens, shortest, longest):
        return n_tokens / longest

    return patch.object(reward, "format_reward", length_reward)


def select_lowest_entropy():
    """Select the most certain tokens instead of the least certain ones."""
    select = reward.select_tokens

    def select_lowest(entropy, mask, fraction):
        return select(-entropy, mask, fraction)

    return patch.object(reward, "select_tokens", select_lowest)


# --- rewards ---


def add_rewards(**functions):
    """Add rewards to the registry; a run uses those that its flags give a weight."""
    return patch.dict(reward.REWARDS, functions)


def named_cells(text):
    """The cells (row, column) that a text names, counted from 0."""
    return [(int(r) - 1, int(c) - 1) for r, c in re.findall(r"\br(\d) c(\d)\b", text)]


def place_reward(x):
    """1 if the last named cell is one that the card overlaps, else 0. Needs no attention."""
    side = int(len(x.region) ** 0.5)
    cells = [[row * side + column for row, column in named_cells(text)][-1:] for text in x.texts]
    return [float(any(cell < len(x.region) and x.region[cell] for cell in c)) for c in cells]


def gated_attention(x):
    """r_v of right answers, -1 for wrong ones."""
    right = torch.tensor([reward.accuracy_reward(text, x.answer) for text in x.texts]).bool()
    return torch.where(right, reward.attention_reward(x.attention, x.region, x.selected), -1.0)


def attention_before_answer(x):
    """r_v of the selected tokens before <answer>. In the tiny world a word is a token."""
    ends = torch.tensor([len(text.split("<answer>")[0].split()) for text in x.texts])
    before = torch.arange(x.selected.shape[1]) < ends[:, None]
    return reward.attention_reward(x.attention, x.region, x.selected & before)


def std_plus(floor, divide=True):
    """Advantages divided by std + `floor`, or not divided."""

    def advantages(rewards):
        centered = rewards - rewards.mean()
        return centered / (rewards.std() + floor) if divide else centered

    return patch.object(reward, "group_advantages", advantages)


# --- regions and labels ---


def change_examples(function, count=None):
    """Change the training examples. Args: function (example, cards of the scene, random.Random of
    the example) -> example; count, train on this many scenes only."""
    original = sayo_mini.step_examples

    def changed(train_set, step, cfg):
        scenes = replace(train_set, count=count or train_set.count)
        return [change(scenes, example) for example in original(scenes, step, cfg)]

    def change(scenes, example):
        cards = scenes.layout(int(example.id.rsplit("-", 1)[1]))
        return function(example, cards, random.Random(example.id))

    return patch.object(sayo_mini, "step_examples", changed)


def centered_box(example, cards, rng):
    (x1, y1, x2, y2), (width, height) = example.boxes[0], example.image.size
    left, top = (width - (x2 - x1)) // 2, (height - (y2 - y1)) // 2
    return replace(example, boxes=[(left, top, left + x2 - x1, top + y2 - y1)])


def boxes_of_all_cards(example, cards, rng):
    return replace(example, boxes=[card.box for card in cards])


def wrong_label(share, example, cards, rng):
    """The answer of this share of the questions is a random wrong color."""
    wrong = rng.choice([name for name in NAMES if name != example.answer])
    return replace(example, answer=wrong) if rng.random() < share else example


def wrong_box(share, example, cards, rng):
    """The box of this share of the questions is that of a random other card."""
    box = rng.choice(cards[1:]).box
    return replace(example, boxes=[box]) if rng.random() < share else example


def wrong_label_and_box(share, example, cards, rng):
    return wrong_box(share, wrong_label(share, example, cards, rng), cards, rng)


def jitter(pixels, example, cards, rng):
    """The box is moved by up to `pixels` in each direction, within the image."""
    x1, y1, x2, y2 = example.boxes[0]
    dx = min(max(rng.randint(-pixels, pixels), -x1), example.image.width - x2)
    dy = min(max(rng.randint(-pixels, pixels), -y1), example.image.height - y2)
    return replace(example, boxes=[(x1 + dx, y1 + dy, x2 + dx, y2 + dy)])


def few_labels(share, example, cards, rng):
    """Only this share of the questions has an answer; every question has its box."""
    return example if rng.random() < share else replace(example, answer="(unknown)")


def unchanged(example, cards, rng):
    return example


def on_data(function, count=None):
    """The `change` of an arm that differs from another only in its training examples."""
    return lambda seed: change_examples(function, count)


# --- the arms ---

ARMS = {
    SAYO: Arm(weight_flags(attention=1)),
    BOTH: Arm(weight_flags(attention=1, accuracy=1)),
    ACCURACY: Arm(weight_flags(accuracy=1)),
    BOTH_SLOWER: Arm(weight_flags(attention=1, accuracy=1), rate=4e-4),
    ACCURACY_SLOWER: Arm(weight_flags(accuracy=1), rate=4e-4),
    PLACE: Arm(weight_flags(place=1), lambda seed: add_rewards(place=place_reward)),
    LOSS: Arm(weight_flags(), lambda seed: attention_loss()),
    LOSS_FASTER: Arm(weight_flags(), lambda seed: attention_loss(), rate=2e-4),
    LOSS_AND_ACCURACY: Arm(weight_flags(accuracy=1), lambda seed: attention_loss()),
    FORMAT: Arm(weight_flags(), rate_of=SAYO),
    LENGTH: Arm(weight_flags(), lambda seed: reward_length(), SAYO),
    ROLLED_BOX: Arm(weight_flags(attention=1), lambda seed: roll_box(), SAYO),
    SHUFFLED_SCORES: Arm(weight_flags(attention=1), shuffle_scores, SAYO),
    CENTERED_BOX: Arm(weight_flags(attention=1), on_data(centered_box), SAYO),
    ALL_CARDS: Arm(weight_flags(attention=1), on_data(boxes_of_all_cards), SAYO),
}
MAIN_ARMS = [SAYO, BOTH, ACCURACY]


def remedies():
    """Changes of SAYO that might prevent its collapse. Returns: {name: Arm}."""
    sayo = weight_flags(attention=1)
    gated = weight_flags(gated=1)
    before = weight_flags(before=1)
    flags = {
        "beta 0.01": sayo + ["--beta", "0.01"],
        "beta 0.04": sayo + ["--beta", "0.04"],
        "beta 0.1": sayo + ["--beta", "0.1"],
        "learning rate 1e-4": sayo,
        "half the attention, half accuracy": weight_flags(attention=0.5, accuracy=0.5),
    }
    arms = {name: Arm(value, rate_of=SAYO) for name, value in flags.items()}
    arms["learning rate 1e-4"] = replace(arms["learning rate 1e-4"], rate=1e-4)
    arms["no division by std"] = Arm(sayo, lambda seed: std_plus(0, divide=False), SAYO)
    arms["std + 0.2"] = Arm(sayo, lambda seed: std_plus(0.2), SAYO)
    arms["tokens before the answer"] = Arm(
        before, lambda seed: add_rewards(before=attention_before_answer), SAYO
    )
    arms["gated by accuracy"] = Arm(gated, lambda seed: add_rewards(gated=gated_attention), SAYO)
    return arms


def noise_arms():
    """Wrong labels, wrong boxes and few questions. Returns: {name: Arm}."""
    arms = {}

    def add(name, arm, function, count=None):
        arms[f"{arm}, {name}"] = replace(
            ARMS[arm], change=on_data(function, count), rate_of=ARMS[arm].rate_of or arm
        )

    for share in (0.2, 0.4, 0.6):
        add(f"{share:.0%} of labels wrong", ACCURACY, partial(wrong_label, share))
        add(f"{share:.0%} of boxes wrong", SAYO, partial(wrong_box, share))
        add(f"{share:.0%} of labels and boxes wrong", BOTH, partial(wrong_label_and_box, share))
    for pixels in (8, 16, 32):
        add(f"boxes moved by up to {pixels} px", SAYO, partial(jitter, pixels))
    for count in (16, 64, 256):
        for arm in MAIN_ARMS:
            add(f"{count} questions", arm, unchanged, count)
    for share in (0.05, 0.1, 0.25):
        for arm in (ACCURACY, BOTH, BOTH_SLOWER):
            add(f"{share:.0%} of questions labeled", arm, partial(few_labels, share))
    return arms


def looks_arms():
    """The arms in the world of second looks. Returns: {name: Arm}."""
    names = (SAYO, BOTH, ACCURACY, PLACE, ROLLED_BOX, SHUFFLED_SCORES, CENTERED_BOX)
    settings = second_looks.SETTINGS.items()
    flags = [part for name, value in settings for part in (f"--{name}", str(value))]
    return {name: replace(ARMS[name], flags=[*ARMS[name].flags, *flags]) for name in names}


# --- heads ---


def probe_untrained_model(vlm, cfg, count):
    """Probe the untrained model on validation scenes, with both alignments.
    Returns: {alignment: {"auroc": (L + 1, H + 1), "gap": the same}}, nested lists."""
    scenes, results = Scenes("validation", count), {}
    for alignment in ("query", "predict"):
        auroc, _, gap = probe(vlm, scenes, replace(cfg, alignment=alignment))
        results[alignment] = {"auroc": auroc.tolist(), "gap": gap.tolist()}
    return results


def discriminative_head(probe_results):
    """The head, over both alignments, whose AUROC differs most between right and wrong answers.
    Returns: {"alignment": name, "layers": index, "heads": index}."""
    gaps = {name: torch.tensor(tables["gap"]) for name, tables in probe_results.items()}
    alignment = max(gaps, key=lambda name: gaps[name][:-1, :-1].max())
    layer, head = most_discriminative_head(gaps[alignment])
    return {"alignment": alignment, "layers": layer, "heads": head}


def variant_arms(probe_results):
    """Variants of attention + format, some with heads found by the probe. The best layer in the
    probe was the last one, which the arm already uses. Returns: {name: Arm}."""
    layer, heads = best_layer_and_heads(torch.tensor(probe_results["query"]["auroc"]))
    heads, single = ",".join(map(str, heads)), discriminative_head(probe_results)
    single_flags = [part for name, value in single.items() for part in (f"--{name}", str(value))]
    best_flags = ["--layers", str(layer), "--heads", heads]
    single_name = f"layer {single['layers']}, head {single['heads']}, {single['alignment']}"
    flags = {
        "all tokens": ["--token_fraction", "1"],
        LOWEST_ENTROPY: [],
        "predict alignment": ["--alignment", "predict"],
        "all layers": ["--layers", "all"],
        f"best three heads (layer {layer}, heads {heads})": best_flags,
        f"most discriminative head ({single_name})": single_flags,
    }
    arms = {n: Arm(weight_flags(attention=1) + f, rate_of=SAYO) for n, f in flags.items()}
    lowest = replace(arms[LOWEST_ENTROPY], change=lambda seed: select_lowest_entropy())
    return arms | {LOWEST_ENTROPY: lowest}
