"""The sentences of "In short" in docs/evidence.md, with what must hold in the results for each."""

from statistics import fmean as mean
from textwrap import fill

from bench.ablation_arms import (
    ACCURACY,
    ALL_CARDS,
    BOTH,
    CENTERED_BOX,
    FORMAT,
    LOSS_AND_ACCURACY,
    LOSS_FASTER,
    MAIN_ARMS,
    PLACE,
    ROLLED_BOX,
    SAYO,
    SHUFFLED_SCORES,
)
from bench.ablation_collapse import collapse_step, curve, kept_accuracy
from bench.ablation_stats import (
    format_interval,
    group_by_arm,
    measured,
    paired_difference,
    run_key,
)


class Study:
    """Means and differences of the results of a stage, by arm and metric."""

    def __init__(self, results, kind="arm"):
        self.results = results
        self.measured = {arm: measured(rows) for arm, rows in group_by_arm(results, kind).items()}

    def mean(self, arm, metric="accuracy"):
        return mean(row[metric] for row in self.measured[arm].values())

    def difference(self, ours, theirs, metric="accuracy"):
        """Returns: the mean over seeds, half of its 95 % interval, and p."""
        return paired_difference(self.measured[ours], self.measured[theirs], metric)

    def long(self, arm, steps=300):
        """The runs of an arm with more steps, a list of rows."""
        return list(group_by_arm(self.results, "length", steps).get(arm, {}).values())


def claims(results, training):
    """Returns: a list of (sentence, whether it holds in these results), for the stages that ran."""
    study, looks, found = Study(results), Study(results, "looks"), []
    if all(study.long(arm) for arm in [*MAIN_ARMS, PLACE]):
        found += length_claims(study, training)
    if study.measured:
        found += arm_claims(study)
    if ACCURACY in looks.measured:
        found += looks_claims(looks)
    return found


def arm_claims(study):
    acc, fixed = study.mean, lambda arm: study.mean(arm, "ground_truth_auroc")
    base, sayo = acc("base"), acc(SAYO)
    place, half, _ = study.difference(SAYO, PLACE)
    both, both_half, _ = study.difference(BOTH, ACCURACY)
    loss, loss_half, _ = study.difference(LOSS_AND_ACCURACY, ACCURACY)
    wrong = [acc(arm) for arm in (ROLLED_BOX, CENTERED_BOX, ALL_CARDS)]
    early = [study.mean("base", f"early_look_if_{name}") for name in ("right", "wrong")]
    return [
        (
            f"""**A reward without attention does as well.** After 60 steps, rewarding a text for
            naming a cell of the card reaches an accuracy of {acc(PLACE):.3f}, SAYO {sayo:.3f}
            (difference {format_interval(place, half, "+")}). On this task, attention at the
            uncertain words is a way to read which place the text names.""",
            abs(place) < 0.05,
        ),
        (
            f"""**The box matters, as a place.** SAYO raises accuracy from {base:.3f} to {sayo:.3f}
            without knowing any answer. With the box rolled to another place, at the center of
            the image, or around all cards, it falls to {wrong[0]:.3f}, {wrong[1]:.3f} and
            {wrong[2]:.3f}; with shuffled scores it is {acc(SHUFFLED_SCORES):.3f}, with the
            format reward alone {acc(FORMAT):.3f}.""",
            sayo > base + 0.1 and max(wrong) < base - 0.05 and abs(acc(FORMAT) - base) < 0.03,
        ),
        (
            f"""**Rewarding accuracy teaches this task better**: {acc(ACCURACY):.3f}. Adding
            attention to it gains nothing ({format_interval(both, both_half, "+")}). As in the
            paper, every real reward beats the base model. Unlike in the paper, attention does
            not beat accuracy. With both, most answers no longer name the card
            ({study.mean(BOTH, "on_card"):.3f} do), right as they are.""",
            acc(ACCURACY) > sayo + 0.05
            and both - both_half < 0
            and min(acc(BOTH), sayo) > base
            and study.mean(BOTH, "on_card") < 0.5,
        ),
        (
            f"""**SAYO moves the text; a loss moves attention.** On ground-truth text, AUROC is
            {fixed("base"):.3f} before and {fixed(SAYO):.3f} after SAYO (after the text-only
            reward: {fixed(PLACE):.3f}). The attention loss raises it to {fixed(LOSS_FASTER):.3f},
            and with the accuracy reward to {fixed(LOSS_AND_ACCURACY):.3f}. Answers do not get
            better by that: accuracy is {acc(LOSS_FASTER):.3f} ({base:.3f} before), and
            {acc(LOSS_AND_ACCURACY):.3f} with the accuracy reward,
            {format_interval(loss, loss_half, "+")} compared with that reward alone.""",
            abs(fixed(SAYO) - fixed("base")) < 0.02
            and fixed(LOSS_FASTER) > fixed("base") + 0.03
            and acc(LOSS_FASTER) < base + 0.02
            and loss - loss_half < 0,
        ),
        (
            f"""**The model does look; it names wrongly.** At the color word, before any place is
            written, one head of the untrained model looks at the card in {early[0]:.3f} of
            right and {early[1]:.3f} of wrong answers.""",
            min(early) > 0.9,
        ),
    ]


def length_claims(study, training):
    def last(arm):
        return mean(row["measured"]["accuracy"] for row in study.long(arm))

    def lost(arm):
        return sum(collapse_step(row) is not None for row in study.long(arm))

    sayo, runs = study.long(SAYO), len(study.long(SAYO))
    kept = mean(kept_accuracy(row, training[run_key(row)]) for row in sayo)
    end = mean(curve(row)[-1] for row in sayo)
    lowest = min(value for row in study.long(BOTH) for value in curve(row))
    rewards = [training[run_key(row)]["rewards/attention/mean"] for row in sayo]
    early_r_v, r_v = (
        mean(mean(run[part]) for run in rewards) for part in (slice(20, 40), slice(-20, None))
    )
    named = [mean(curve(row, "on_card")[i] for row in sayo) for i in (1, -1)]
    return [
        (
            f"""**The attention reward alone does not last.** After 300 steps, {lost(SAYO)} of
            {runs} runs of SAYO have collapsed, and the mean accuracy is {last(SAYO):.3f} (after
            60 steps: {study.mean(SAYO):.3f}). With the accuracy reward alone, {lost(ACCURACY)}
            of {len(study.long(ACCURACY))} have collapsed ({last(ACCURACY):.3f}), with both
            rewards {lost(BOTH)} of {len(study.long(BOTH))} ({last(BOTH):.3f}), though one of
            them falls to {lowest:.3f} on the way. `--keep_best` would have kept {kept:.3f}
            instead of {end:.3f} on the validation questions.""",
            lost(SAYO) > 0 and last(SAYO) < study.mean(SAYO) and kept > end + 0.3,
        ),
        (
            f"""**Attention can stay on the card while the text leaves it.** A reward for naming
            the place, without attention, does not collapse ({lost(PLACE)} of
            {len(study.long(PLACE))} runs, {last(PLACE):.3f} after 300 steps), so it is not only
            that nothing rewards the answer. In the last 20 steps of SAYO, samples still earn an
            r_v of {r_v:.2f} ({early_r_v:.2f} in steps 21 to 40), but {named[1]:.2f} of the answers
            name the card ({named[0]:.2f} at step 40).""",
            lost(PLACE) == 0
            and last(PLACE) > last(SAYO) + 0.3
            and r_v > early_r_v - 0.1
            and named[1] < named[0] - 0.1,
        ),
    ]


def looks_claims(looks):
    def again(arm):
        return looks.mean(arm, "sampled_looked_again_if_first_off")

    acc, last = looks.mean, lambda arm: looks.mean(arm, "last_on_card")
    placebos = [again(arm) for arm in (ROLLED_BOX, SHUFFLED_SCORES, CENTERED_BOX)]
    return [
        (
            f"""**A model that can look twice learns to look again.** Of its samples whose first
            look is off the card, {again("base"):.3f} look again before training and
            {again(SAYO):.3f} after SAYO; with a wrong box or shuffled scores, at most
            {max(placebos):.3f} do. Accuracy rises from {acc("base"):.3f} to {acc(SAYO):.3f}.
            Again, the text-only reward does the same ({again(PLACE):.3f}, {acc(PLACE):.3f}).""",
            again(SAYO) > again("base") + 0.3
            and max(placebos) < again("base")
            and min(acc(SAYO), acc(PLACE)) > acc("base") + 0.2
            and again(PLACE) > again("base") + 0.3,
        ),
        (
            f"""**Rewarded answers become right; rewarded looks become true.** There, the accuracy
            reward alone makes {acc(ACCURACY):.3f} of the answers right, but the last place that
            they name is on the card in {last(ACCURACY):.3f}, less than before
            ({last("base"):.3f}). With both rewards, it is {last(BOTH):.3f}, and accuracy is
            {acc(BOTH):.3f}.""",
            acc(ACCURACY) > acc(SAYO)
            and last(ACCURACY) < last("base")
            and last(BOTH) > last("base") + 0.1
            and abs(acc(BOTH) - acc(ACCURACY)) < 0.05,
        ),
    ]


def reading(results, training):
    """The list "In short"."""
    sentences = (" ".join(sentence.split()) for sentence, _ in claims(results, training))
    return "\n".join(fill(f"- {text}", 100, subsequent_indent="  ") for text in sentences)
