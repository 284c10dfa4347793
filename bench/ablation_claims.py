"""The sentences of "In short" in docs/evidence.md, with what must hold in the results for each."""

from functools import partial
from statistics import fmean as mean
from textwrap import fill

from bench.ablation_arms import (
    ACCURACY,
    ACCURACY_SLOWER,
    ALL_CARDS,
    ARMS,
    BOTH,
    BOTH_SLOWER,
    CENTERED_BOX,
    FORMAT,
    LOSS_AND_ACCURACY,
    LOSS_FASTER,
    MAIN_ARMS,
    PLACE,
    ROLLED_BOX,
    SAYO,
    SHUFFLED_SCORES,
    looks_arms,
    noise_arms,
    remedies,
)
from bench.ablation_collapse import (
    CHOSEN_ON,
    alarm_counts,
    collapse_step,
    curve,
    kept_accuracy,
    largest_loss,
)
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
        self.results, self.kind = results, kind
        self.measured = {arm: measured(rows) for arm, rows in group_by_arm(results, kind).items()}

    def mean(self, arm, metric="accuracy"):
        return mean(row[metric] for row in self.measured[arm].values())

    def difference(self, ours, theirs, metric="accuracy"):
        """Returns: the mean over seeds, half of its 95 % interval, and p."""
        return paired_difference(self.measured[ours], self.measured[theirs], metric)

    def rate(self, arm):
        """The learning rate of an arm, as 3.2e-3."""
        rows = group_by_arm(self.results, self.kind)[arm].values()
        return next(f"{row['rate']:.1e}".replace("e-0", "e-") for row in rows)

    def long(self, arm, steps=300):
        """The runs of an arm with more steps, a list of rows."""
        return list(group_by_arm(self.results, "length", steps).get(arm, {}).values())


def claims(results, training):
    """Returns: a list of (sentence, whether it holds in these results), for the stages that are
    complete but for some seeds."""
    study, looks, noise = (Study(results, kind) for kind in ("arm", "looks", "noise"))
    changes, found = group_by_arm(results, "remedy"), []
    if all(study.long(arm) for arm in [*MAIN_ARMS, PLACE]):
        found += length_claims(study, training)
    if set(ARMS) <= set(study.measured):
        found += arm_claims(study) + attention_claims(study)
    if set(looks_arms()) <= set(looks.measured):
        found += looks_claims(looks)
    if set(noise_arms()) <= set(noise.measured):
        found += noise_claims(study, noise.measured)
    if set(remedies()) <= set(changes):
        found += remedy_claims(changes)
        found += alarm_claims(alarm_counts(results, training))
    return found


def arm_claims(study):
    acc = study.mean
    base, sayo = acc("base"), acc(SAYO)
    place, half, _ = study.difference(SAYO, PLACE)
    both, both_half, _ = study.difference(BOTH, ACCURACY)
    slow, slow_half, _ = study.difference(BOTH_SLOWER, ACCURACY_SLOWER)
    wrong = [acc(arm) for arm in (ROLLED_BOX, CENTERED_BOX, ALL_CARDS)]
    explained = study.mean("base", "r_v_explained_by_cell")
    own = [study.mean(arm, "auroc") for arm in (BOTH, BOTH_SLOWER)]
    named = [study.mean(arm, "on_card") for arm in (BOTH, BOTH_SLOWER)]
    base_own, base_named = study.mean("base", "auroc"), study.mean("base", "on_card")
    return [
        (
            f"""**A reward on the text alone does as well.** After 60 steps, rewarding the model
            when its text names a cell of the card gives an accuracy of {acc(PLACE):.3f}, SAYO
            {sayo:.3f} (difference {format_interval(place, half, "+")}). Both use the same boxes.
            Within a group, the named cell explains {explained:.3f} of the variance of the untrained
            model's r_v: here, attention at the uncertain words reads which place is named.""",
            abs(place) < 0.05 and explained > 0.95,
        ),
        (
            f"""**The box must be in the right place.** SAYO raises accuracy from {base:.3f} to
            {sayo:.3f} without answer labels. With its scores shuffled within the group, accuracy
            is {acc(SHUFFLED_SCORES):.3f}, with the format reward alone {acc(FORMAT):.3f}. With the
            box rolled to another place, at the center of the image, or around all cards, answers
            get worse: {wrong[0]:.3f}, {wrong[1]:.3f} and {wrong[2]:.3f}.""",
            sayo > base + 0.1
            and max(wrong) < base - 0.05
            and abs(acc(FORMAT) - base) < 0.03
            and abs(acc(SHUFFLED_SCORES) - base) < 0.05,
        ),
        (
            f"""**Rewarding accuracy teaches this task better**: {acc(ACCURACY):.3f}
            ({acc(ACCURACY_SLOWER):.3f} at SAYO's rate). Adding attention does not help
            ({format_interval(both, both_half, "+")}; {format_interval(slow, slow_half, "+")} at
            SAYO's rate). As in the paper, attention, accuracy and both beat the base model. Unlike
            in the paper, attention does not beat accuracy.""",
            min(acc(ACCURACY), acc(ACCURACY_SLOWER)) > sayo + 0.05
            and max(both, slow) < 0
            and min(acc(BOTH), sayo) > base,
        ),
        (
            f"""**At a high rate, both rewards give right answers and wrong looks.** At the rate
            that is best for their accuracy ({study.rate(BOTH)}), it is {acc(BOTH):.3f}, but
            {named[0]:.3f} of the answers name the card ({base_named:.3f} before), and the AUROC of
            their attention is {own[0]:.3f} ({base_own:.3f} before), although attention is rewarded.
            At SAYO's rate, accuracy is {acc(BOTH_SLOWER):.3f}, {named[1]:.3f} name the card, and
            the AUROC is {own[1]:.3f}.""",
            named[0] < base_named - 0.1 < named[1] - 0.2
            and own[0] < base_own < own[1]
            and acc(BOTH) > acc(BOTH_SLOWER),
        ),
    ]


def attention_claims(study):
    acc, fixed = study.mean, partial(study.mean, metric="ground_truth_auroc")
    loss, loss_half, _ = study.difference(LOSS_AND_ACCURACY, ACCURACY)
    base = acc("base")
    early = [study.mean("base", f"early_look_if_{name}") for name in ("right", "wrong")]
    return [
        (
            f"""**SAYO does not move attention on a fixed text.** On the right answer, AUROC is
            {fixed("base"):.3f} before and {fixed(SAYO):.3f} after ({fixed(PLACE):.3f} after the
            text-only reward). A differentiable attention loss moves it: to {fixed(LOSS_FASTER):.3f}
            at a rate of 2e-4, to {fixed(LOSS_AND_ACCURACY):.3f} with the accuracy reward. Answers
            do not get better: {acc(LOSS_FASTER):.3f} ({base:.3f} before); with the accuracy reward
            {acc(LOSS_AND_ACCURACY):.3f}, {format_interval(loss, loss_half, "+")} compared with that
            reward alone. The weight of the loss was not tuned.""",
            abs(fixed(SAYO) - fixed("base")) < 0.02
            and fixed(LOSS_FASTER) > fixed("base") + 0.03
            and acc(LOSS_FASTER) < base + 0.02
            and loss < 0,
        ),
        (
            f"""**The model sees the card, and names another.** At the color word, before any place
            is written, the strongest cell of one head of the untrained model is on the card in
            {100 * early[0]:.1f} % of right and {100 * early[1]:.1f} % of wrong answers. So the
            information is there; whether the model uses it was not tested.""",
            min(early) > 0.9,
        ),
    ]


def length_claims(study, training):
    def last(arm):
        return mean(row["measured"]["accuracy"] for row in study.long(arm))

    def lost(arm):
        return sum(collapse_step(row) is not None for row in study.long(arm))

    sayo = study.long(SAYO)
    kept = mean(kept_accuracy(row, training[run_key(row)]) for row in sayo)
    end = mean(curve(row)[-1] for row in sayo)
    lowest = min(value for row in study.long(BOTH) for value in curve(row))
    dips = [largest_loss(row) for row in study.long(BOTH)]
    rewards = [training[run_key(row)]["rewards/attention/mean"] for row in sayo]
    early_r_v, r_v = mean(mean(r[20:40]) for r in rewards), mean(mean(r[-20:]) for r in rewards)
    named = [mean(curve(row, "on_card")[i] for row in sayo) for i in (1, -1)]
    ends = [row["measured"]["accuracy"] for row in sayo]
    return [
        (
            f"""**The attention reward alone does not last.** From step 60 to 300, the accuracy of
            SAYO falls from {study.mean(SAYO):.3f} to {last(SAYO):.3f} ({min(ends):.3f} to
            {max(ends):.3f}): {lost(SAYO)} of {len(sayo)} runs collapse. With the accuracy reward
            alone, none does ({last(ACCURACY):.3f}). With both, none ends collapsed
            ({last(BOTH):.3f}), but all lose {min(dips):.2f} to {max(dips):.2f} on the
            way, and one falls to {lowest:.3f}. `--keep_best` would have ended SAYO's runs with
            {kept:.3f} instead of {end:.3f} (validation questions).""",
            lost(SAYO) == len(sayo)
            and lost(ACCURACY) == lost(BOTH) == 0
            and min(dips) > 0.05
            and kept > end + 0.3,
        ),
        (
            f"""**Attention can stay on the card while the text leaves it.** A reward for naming
            the place, without attention, does not collapse ({lost(PLACE)} of
            {len(study.long(PLACE))} runs, {last(PLACE):.3f} after 300 steps), so a missing reward
            for the answer alone does not explain it. In the last 20 steps of SAYO, samples still
            earn an r_v of {r_v:.2f} ({early_r_v:.2f} in steps 21 to 40), but {named[1]:.2f} of the
            answers name the card ({named[0]:.2f} at step 40).""",
            lost(PLACE) == 0
            and last(PLACE) > last(SAYO) + 0.3
            and r_v > early_r_v - 0.1
            and named[1] < named[0] - 0.1,
        ),
    ]


def looks_claims(looks):
    def again(arm):
        return looks.mean(arm, "sampled_looked_again")

    acc, wrong_box = looks.mean, max(again(arm) for arm in (ROLLED_BOX, CENTERED_BOX))
    first = partial(looks.mean, metric="first_on_card")
    last = partial(looks.mean, metric="last_on_card")
    shuffled = [m["sampled_looked_again"] for m in looks.measured[SHUFFLED_SCORES].values()]
    fixed, spoiled = (looks.mean(SAYO, f"named_{name}") for name in ("off_on", "on_off"))
    by_seed = [m["last_on_card"] for m in looks.measured[ACCURACY].values()]
    return [
        (
            f"""**A model that can look twice learns to look again, always.** {again("base"):.3f} of
            its samples look again before training, {again(SAYO):.3f} after SAYO, whether the first
            look was right or not; with a wrong box at most {wrong_box:.3f} do, with shuffled scores
            {min(shuffled):.3f} to {max(shuffled):.3f}. Accuracy rises from {acc("base"):.3f} to
            {acc(SAYO):.3f}, because the first look gets better: it is on the card in
            {first(SAYO):.3f} of the answers ({first("base"):.3f} before). Further looks come to the
            card in {fixed:.3f} of the answers, and leave it in {spoiled:.3f}. Again, the text-only
            reward does as well ({acc(PLACE):.3f}).""",
            again(SAYO) > again("base") + 0.3
            and wrong_box < again("base") / 2
            and max(shuffled) < again(SAYO)
            and min(acc(SAYO), acc(PLACE)) > acc("base") + 0.2
            and first(SAYO) > first("base") + 0.2
            and abs(fixed - spoiled) < 0.05,
        ),
        (
            f"""**Right answers do not need true looks.** In that world, the accuracy reward, at its
            best rate ({looks.rate(ACCURACY)}), makes {acc(ACCURACY):.3f} of the answers right, but
            the last place that they name is on the card in {last(ACCURACY):.3f}
            ({min(by_seed):.3f} to {max(by_seed):.3f}; {last("base"):.3f} before). With both rewards
            (rate {looks.rate(BOTH)}) it is {last(BOTH):.3f}, with an accuracy of {acc(BOTH):.3f}.
            As with one look, the looks are wrong at the highest rate.""",
            acc(ACCURACY) > acc(SAYO)
            and last(BOTH) > last(ACCURACY) + 0.1
            and abs(acc(BOTH) - acc(ACCURACY)) < 0.05
            and float(looks.rate(ACCURACY)) > float(looks.rate(BOTH)),
        ),
    ]


def noise_claims(study, noise):
    def acc(arm, name):
        return mean(m["accuracy"] for m in noise[f"{arm}, {name}"].values())

    def listed(arm, names):
        return ", ".join(f"{acc(arm, name):.3f}" for name in names)

    sayo, accuracy = study.mean(SAYO), study.mean(ACCURACY)
    labels, boxes = ([f"{p}% of {what} wrong" for p in (40, 60)] for what in ("labels", "boxes"))
    moved = [f"boxes moved by up to {pixels} px" for pixels in (8, 16, 32)]
    few = [f"{share}% of questions labeled" for share in (5, 10, 25)]
    worst = acc(BOTH, "20% of labels and boxes wrong")
    sixteen = [acc(arm, "16 questions") for arm in (SAYO, ACCURACY, BOTH)]
    more = [acc(arm, "64 questions") for arm in (SAYO, ACCURACY, BOTH)]
    return [
        (
            f"""**Boxes are worth more than very few answers.** Without any answer, SAYO gives
            {sayo:.3f}. With answers for 5, 10 and 25 % of the questions, the accuracy reward gives
            {listed(ACCURACY, few)}. With boxes for all questions as well, it is
            {listed(BOTH_SLOWER, few)} at SAYO's rate, but {listed(BOTH, few)} at
            {study.rate(BOTH)}, the best rate of both with all answers. So boxes win at 5 %,
            answers at 25 %.""",
            acc(ACCURACY, few[0]) < sayo - 0.02
            and acc(ACCURACY, few[2]) > max(sayo, acc(BOTH_SLOWER, few[2])) + 0.02
            and acc(BOTH_SLOWER, few[0]) > acc(ACCURACY, few[0]) + 0.02,
        ),
        (
            f"""**With 16 training questions, SAYO is best; with 64, accuracy is**: SAYO gives
            {sixteen[0]:.3f} and {more[0]:.3f}, the accuracy reward {sixteen[1]:.3f} and
            {more[1]:.3f}, both {sixteen[2]:.3f} and {more[2]:.3f}, each at its own rate.""",
            sixteen[0] > max(sixteen[1:]) + 0.02 and more[1] > max(more[0], more[2]),
        ),
        (
            f"""**Each kind of label may be wrong in 40 %.** With 40 and 60 % of the answers wrong,
            the accuracy reward gives {listed(ACCURACY, labels)} ({accuracy:.3f} without); with as
            many boxes on a wrong card, SAYO gives {listed(SAYO, boxes)} ({sayo:.3f} without); with
            boxes moved by up to 8, 16 and 32 pixels, {listed(SAYO, moved)}. Both rewards, at their
            high rate, do not bear it: {worst:.3f} with 20 % of answers and boxes wrong.""",
            acc(ACCURACY, labels[0]) > accuracy - 0.05
            and acc(SAYO, boxes[0]) > sayo - 0.05
            and worst < study.mean(BOTH) - 0.1,
        ),
    ]


def remedy_claims(remedies):
    runs = {name: list(arm.values()) for name, arm in remedies.items()}
    ends = {name: mean(curve(row)[-1] for row in rows) for name, rows in runs.items()}
    held = [name for name, rows in runs.items() if not any(map(collapse_step, rows))]
    lost, seeds = [name for name in runs if name not in held], min(map(len, runs.values()))

    def listed(names):
        names = sorted(names, key=ends.get, reverse=True)
        return ", ".join(f"{name} ({ends[name]:.3f})" for name in names)

    return [
        (
            f"""**Some changes prevent the collapse of SAYO.** With these, none of
            the {seeds} runs of 300 steps collapses (in parentheses, the validation
            accuracy at the end): {listed(held)}. With these, at least one does: {listed(lost)}.""",
            bool(held) and min(map(ends.get, held)) > 0.7,
        )
    ]


def alarm_claims(counts):
    def total(name, groups):
        return sum(group[name] for group in groups)

    every, new = list(counts.values()), [c for name, c in counts.items() if name != CHOSEN_ON]
    later = (
        f"""On the runs that ended after the thresholds were chosen, it is
        {total("caught", new)} of {total("collapsed", new)} collapses, and {total("false", new)} of
        {total("healthy", new)} healthy runs."""
        if new
        else ""
    )
    return [
        (
            f"""**Most collapses are announced.** {total("caught", every)} of
            {total("collapsed", every)} have a warning before the first measurement that shows the
            loss of 0.2 (every 20 steps; interpolated, {total("early", every)} before 0.2 is lost).
            {total("false", every)} of {total("healthy", every)} healthy runs have one. {later}""",
            total("caught", every) >= 0.9 * total("collapsed", every)
            and total("early", every) >= 0.8 * total("collapsed", every)
            and total("false", every) <= 0.05 * total("healthy", every),
        )
    ]


def reading(results, training):
    """The list "In short"."""
    sentences = (" ".join(sentence.split()) for sentence, _ in claims(results, training))
    return "\n".join(fill(f"- {text}", 100, subsequent_indent="  ") for text in sentences)
