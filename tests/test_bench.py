"""The study (bench/ablation.py): the arms do what they claim, the statistics are correct, and the
documents show the committed results."""

import json
import random
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ask, load

import reward
import sayo_mini
import sources
from bench import (
    ablation,
    ablation_arms,
    ablation_claims,
    ablation_collapse,
    ablation_loss,
    ablation_measure,
    ablation_report,
    ablation_stats,
    second_looks,
)
from bench.doc_tables import insert, marked
from config import TINY, Config
from runtime.parser import parse_config
from sources.scenes import Scenes

ROOT = Path(__file__).parent.parent
SCENES = Scenes("validation", 20)


# --- arms -------------------------------------------------------------------------------------


def test_rolled_box_has_the_same_area_elsewhere():
    for example in SCENES:
        true = sayo_mini.example_region(example, (7, 7))
        with ablation_arms.roll_box():
            wrong = sayo_mini.example_region(example, (7, 7))
        assert wrong.sum() == true.sum() and not (wrong & true).any()
    assert sayo_mini.example_region(example, (7, 7)).equal(true)  # the patch is undone


def test_shuffled_scores_are_a_permutation_of_the_groups_own():
    region, selected = torch.arange(4) < 2, torch.ones(6, 3, dtype=torch.bool)
    attention = torch.rand(6, 3, 4, generator=torch.Generator().manual_seed(0))
    true = reward.attention_reward(attention, region, selected)
    with ablation_arms.shuffle_scores(seed=1):
        shuffled = [reward.attention_reward(attention, region, selected) for _ in range(3)]
    assert all(sorted(scores.tolist()) == sorted(true.tolist()) for scores in shuffled)
    assert not shuffled[0].equal(shuffled[1])
    assert any(not scores.equal(true) for scores in shuffled)
    with ablation_arms.shuffle_scores(seed=1):
        assert reward.attention_reward(attention, region, selected).equal(shuffled[0])


def test_length_reward_and_lowest_entropy_selection():
    with ablation_arms.reward_length():
        assert reward.format_reward("no tags", 9, 10, 18) == 0.5
    entropy = torch.tensor([[1.0, 3.0, 2.0, 0.5]])
    mask = torch.tensor([[True, True, True, False]])
    with ablation_arms.select_lowest_entropy():
        selected = reward.select_tokens(entropy, mask, 0.34).tolist()
        assert selected == [[True, False, False, False]]
    assert reward.select_tokens(entropy, mask, 0.34).tolist() == [[False, True, False, False]]


def test_patches_reach_the_rewards_of_the_training_loop():
    """The training loop looks up the patched functions on each call."""
    vlm, cfg = load(), Config(**TINY)
    prompt, completions = ask(vlm, G=8)
    scores = vlm.score(prompt, completions)
    group = vlm, SCENES[0], prompt, completions, scores, cfg

    arms = ablation_arms.ARMS | ablation_arms.variant_arms(PROBE_RESULTS)

    def rewards(arm):
        with arms[arm].change(1):
            return sayo_mini.compute_rewards(*group)

    true, true_inputs = rewards(ablation_arms.SAYO)
    rolled, rolled_inputs = rewards(ablation_arms.ROLLED_BOX)
    assert not (rolled_inputs.region & true_inputs.region).any()
    assert not rolled["attention"].equal(true["attention"])
    shuffled, _ = rewards(ablation_arms.SHUFFLED_SCORES)
    assert not shuffled["attention"].equal(true["attention"])
    assert shuffled["attention"].sort()[0].equal(true["attention"].sort()[0])
    length, _ = rewards(ablation_arms.LENGTH)
    assert length["format"].tolist() == pytest.approx((completions.mask.sum(1) / 18).tolist())
    _, lowest_inputs = rewards(ablation_arms.LOWEST_ENTROPY)
    assert not lowest_inputs.selected.equal(true_inputs.selected)
    again, _ = rewards(ablation_arms.SAYO)
    assert all(again[name].equal(true[name]) for name in true)


PROBE_RESULTS = {
    "query": {
        "auroc": [[0.5, 0.6, 0.55], [0.7, 0.4, 0.9], [1, 1, 1]],
        "gap": [[0.1, 0, 1], [0.2, 0.3, 1], [1, 1, 1]],
    },
    "predict": {
        "auroc": [[0.5, 0.6, 0.8], [0.7, 0.4, 0.6], [1, 1, 1]],
        "gap": [[0, 0.4, 1], [0, 0, 1], [1, 1, 1]],
    },
}


def test_probe_variants_never_choose_the_averages():
    head = ablation_arms.discriminative_head(PROBE_RESULTS)
    assert head == {"alignment": "predict", "layers": 0, "heads": 1}
    arms = ablation_arms.variant_arms(PROBE_RESULTS)
    best = arms["best three heads (layer 1, heads 0,1)"].flags
    assert best[-4:] == ["--layers", "1", "--heads", "0,1"]
    single = arms["most discriminative head (layer 0, head 1, predict)"].flags
    assert single[-6:] == ["--alignment", "predict", "--layers", "0", "--heads", "1"]


def test_every_arm_is_a_valid_command_line(tmp_path):
    names = set(ablation_arms.ARMS)
    for kind in ("arm", "remedy", "noise", "variant"):
        arms = ablation.arms_of(kind, {"probe": PROBE_RESULTS})
        for arm in arms.values():
            assert not arm.rate_of or arm.rate_of in names
            with arm.change(0):
                parse_config(
                    [*ablation_arms.COMMON_FLAGS, *arm.flags, "--output_dir", str(tmp_path)]
                )


def test_dequantizing_once_is_bit_identical(tmp_path):
    flags = [*ablation_arms.COMMON_FLAGS, "--max_steps", "2", "--prompts_per_step", "1"]
    flags += ["--learning_rate", "1e-3"]
    assert sayo_mini.main([*flags, "--output_dir", str(tmp_path / "usual")]) == 0
    with ablation.dequantize_once():
        assert sayo_mini.main([*flags, "--output_dir", str(tmp_path / "once")]) == 0
    for name in ("metrics.jsonl", "samples.jsonl", "adapter/adapter_model.safetensors"):
        usual, once = ((tmp_path / run / name).read_bytes() for run in ("usual", "once"))
        assert usual == once


@pytest.mark.slow
def test_jobs_train_through_the_program_and_add_their_rows(tmp_path):
    """Two arms run one step each, next to the base; every job adds one row and never runs twice."""
    sizes = dict(accuracy=3, sampled=2, harder=1, attention=2, causal=2, groups=2)
    looks = {"early": [1, 0, "color"], "late": [1, 0, "is"]}
    heads = {"discriminative": {"alignment": "query", "layers": 0, "heads": 1}, "looks": looks}
    setup = {"heads": heads, "sizes": sizes, "small_sizes": sizes, "curve": 3, "validation": 3}
    jobs = [ablation.Job("arm", "base", 0, 0, 0.0)]
    jobs += [ablation.Job("arm", ablation_arms.LENGTH, 0, 1, 1e-3)]
    jobs += [ablation.Job("rate", ablation_arms.SAYO, 0, 1, 1e-3)]
    file = tmp_path / "results.json"
    args = Namespace(jobs=2, results=file, output_dir=tmp_path / "runs")
    results = {"runs": [], "setup": setup}
    ablation.run_jobs(jobs, args, results)
    ablation.run_jobs(jobs, args, results)
    saved = json.loads(file.read_text())
    assert saved == results and len(saved["runs"]) == 3
    rows = {row["arm"]: row for row in saved["runs"]}
    assert [point["step"] for point in rows["base"]["curve"]] == [0]
    assert rows[ablation_arms.LENGTH]["curve"] == []  # a point every 20 steps
    assert 0 <= rows[ablation_arms.SAYO]["validation_accuracy"] <= 1
    for name in ("base", ablation_arms.LENGTH):
        assert all(isinstance(v, float | int) for v in rows[name]["measured"].values())
    training = ablation.load_training(file)
    trained = training[ablation_stats.run_key(rows[ablation_arms.LENGTH])]
    assert len(trained["rewards/accuracy/mean"]) == 1


# --- rewards of the arms ----------------------------------------------------------------------


def reward_inputs(texts, region, answer="blue", **more):
    return SimpleNamespace(texts=texts, region=torch.tensor(region), answer=answer, **more)


def test_the_place_reward_reads_the_last_named_cell():
    assert ablation_arms.named_cells("look r1 c2 : red . look r10 c1 r3 c1") == [(0, 1), (2, 0)]
    region = [False, True, False, False, False, False, False, False, False]  # row 1, column 2 of 3
    texts = ["on red r1 c2 is", "r1 c2 r2 c2", "r2 c2 then r1 c2", "no place", "r7 c7"]
    assert ablation_arms.place_reward(reward_inputs(texts, region)) == [1, 0, 1, 0, 0]


def test_gated_attention_and_attention_before_the_answer():
    attention = torch.tensor([[[0.4, 0.2], [0.0, 1.0]]] * 2)  # in the region first, then outside
    selected = torch.ones(2, 2, dtype=torch.bool)
    texts = ["red <answer> blue </answer>", "red <answer> pink </answer>"]
    inputs = reward_inputs(texts, [True, False], attention=attention, selected=selected)
    r_v = reward.attention_reward(attention, inputs.region, selected)
    assert ablation_arms.gated_attention(inputs).tolist() == pytest.approx([r_v[0].item(), -1])
    before = ablation_arms.attention_before_answer(
        inputs
    )  # of the first token: (16 - 9) / (16 + 9)
    assert before.tolist() == pytest.approx([0.28, 0.28], abs=1e-3)


def test_advantages_with_a_floor_or_without_division():
    rewards = torch.tensor([1.0, 0.0, 0.0, 1.0])  # std 0.57735
    with ablation_arms.std_plus(0, divide=False):
        assert reward.group_advantages(rewards).tolist() == [0.5, -0.5, -0.5, 0.5]
    with ablation_arms.std_plus(0.2):
        assert reward.group_advantages(rewards)[0].item() == pytest.approx(0.5 / 0.77735, rel=1e-4)


def changed(function, count=20):
    """Validation examples before and after a change of the training examples."""
    for i in range(count):
        example, cards = SCENES[i % 20], SCENES.layout(i % 20)
        yield example, cards, function(example, cards, random.Random(i))


def test_changed_regions_have_the_intended_place():
    for example, cards, new in changed(ablation_arms.centered_box):
        x1, y1, x2, y2 = new.boxes[0]
        assert abs(x1 + x2 - 112) <= 1 and abs(y1 + y2 - 112) <= 1
        assert x2 - x1 == example.boxes[0][2] - example.boxes[0][0]
    for _, cards, new in changed(ablation_arms.boxes_of_all_cards):
        assert new.boxes == [card.box for card in cards]
    moved = 0
    for example, _, new in changed(lambda *a: ablation_arms.jitter(8, *a)):
        (x1, y1, x2, y2), old = new.boxes[0], example.boxes[0]
        assert (x2 - x1, y2 - y1) == (old[2] - old[0], old[3] - old[1])
        assert min(x1, y1) >= 0 and max(x2, y2) <= 112 and abs(x1 - old[0]) <= 8
        moved += new.boxes[0] != old
    assert moved > 15


def test_changed_labels_have_the_intended_share():
    def wrong(function):
        return [(new.answer != old.answer, new.boxes != old.boxes) for old, _, new in function]

    labels = wrong(changed(lambda *a: ablation_arms.wrong_label(0.4, *a), 500))
    boxes = wrong(changed(lambda *a: ablation_arms.wrong_box(0.4, *a), 500))
    both = wrong(changed(lambda *a: ablation_arms.wrong_label_and_box(0.4, *a), 500))
    for rows, columns in ((labels, [0]), (boxes, [1]), (both, [0, 1])):
        for column in (0, 1):
            share = sum(row[column] for row in rows) / 500
            assert share == (pytest.approx(0.4, abs=0.08) if column in columns else 0)
    few = [new.answer for *_, new in changed(lambda *a: ablation_arms.few_labels(0.1, *a), 500)]
    assert few.count("(unknown)") / 500 == pytest.approx(0.9, abs=0.06)


def test_changed_examples_reach_the_training_loop():
    cfg = Config(**TINY)
    plain = sayo_mini.step_examples(Scenes("train", 480), 3, cfg)
    with ablation_arms.change_examples(ablation_arms.centered_box):
        new = sayo_mini.step_examples(Scenes("train", 480), 3, cfg)
    assert [e.id for e in new] == [e.id for e in plain]
    assert all(a.boxes != b.boxes for a, b in zip(new, plain))
    with ablation_arms.change_examples(ablation_arms.unchanged, 16):
        ids = {
            e.id for s in range(20) for e in sayo_mini.step_examples(Scenes("train", 480), s, cfg)
        }
    assert ids == {f"train-0-{i}" for i in range(16)}


def test_the_attention_loss_by_hand_and_its_gradient():
    rows = torch.tensor([[[0.2, 0.2, 0.4], [9.0, 9.0, 9.0]]], requires_grad=True)
    region, selected = torch.tensor([True, True, False]), torch.tensor([[True, False]])
    divergence = ablation_loss.box_divergence(rows, region, selected)
    # the map is (1, 1, 2) / 4, the box (1, 1, 0) / 2: log(1/2) - log(1/4) = log 2
    assert divergence.item() == pytest.approx(0.693147, rel=1e-5)
    divergence.sum().backward()
    assert rows.grad[0, 0, 2] > 0 > rows.grad[0, 0, 0] and rows.grad[0, 1].eq(0).all()


def test_the_attention_loss_moves_the_attention_of_the_training_loop(tmp_path):
    flags = [*ablation_arms.COMMON_FLAGS, *ablation_arms.weight_flags(), "--max_steps", "1"]
    flags += ["--prompts_per_step", "1", "--learning_rate", "1e-3"]
    norms = []
    for name, context in (("plain", None), ("loss", ablation_loss.attention_loss())):
        with context or ablation_arms.nullcontext():
            assert sayo_mini.main([*flags, "--output_dir", str(tmp_path / name)]) == 0
        row = json.loads((tmp_path / name / "metrics.jsonl").read_text().splitlines()[-1])
        norms.append(row["grad_norm"])
    assert norms[1] > 10 * norms[0]


# --- measurements -----------------------------------------------------------------------------


def graded(texts, grade, cards=None):
    """Grade texts as answers to the first validation scenes."""
    questions = [(SCENES[i], SCENES.layout(i)[0]) for i in range(len(texts))]
    return grade(questions, [SimpleNamespace(texts=[text]) for text in texts])


def places(i):
    """The cell words of the card of scene i, of its neighbor to the left or right on the same card,
    and of a cell that is not on the card."""
    card = SCENES.layout(i)[0]
    row, column = ablation_measure.place_words(card)
    region = sayo_mini.example_region(SCENES[i], (7, 7)).view(7, 7)
    off = (~region).nonzero()[0].tolist()
    others = [c for c in region[int(row[1]) - 1].nonzero().flatten().tolist()]
    near = next((f"{row} c{c + 1}" for c in others if f"c{c + 1}" != column), None)
    return f"{row} {column}", near, f"r{off[0] + 1} c{off[1] + 1}"


def test_answers_are_graded_by_any_cell_of_the_card():
    right = [SCENES[i].answer for i in range(4)]
    i, near = next((i, places(i)[1]) for i in range(4) if places(i)[1])
    texts = [f"the dot on red {places(j)[2]} is x . <answer> no </answer>" for j in range(4)]
    texts[i] = f"the dot on red {near} is {right[i]} . <answer> {right[i]} </answer>"
    row = graded(texts, ablation_measure.grade_answers)
    assert (row["accuracy"], row["right_place"], row["on_card"]) == (0.25, 0, 0.25)
    assert (row["accuracy_if_on_card"], row["accuracy_if_not_on_card"]) == (1, 0)
    assert row["full_sentence"] == 1


def test_first_and_last_looks_are_graded_by_hand():
    (on, _, off), answer = places(0), SCENES[0].answer
    assert places(1)[2] and places(2)[2]
    texts = [
        f"look {off} : red . look {on} : pink . dot . <answer> {answer} </answer>",  # corrected
        f"look {places(1)[2]} : red . dot . <answer> nothing </answer>",
        f"look {places(2)[0]} : red . dot . <answer> {SCENES[2].answer} </answer>",
        "<answer> nothing </answer>",  # names no place
        f"look {places(4)[2]} : red . look {places(4)[0]} : red . dot . <answer> no </answer>",
    ]
    row = graded(texts, ablation_measure.grade_looks)
    shares = {name: row[name] for name in ("accuracy", "first_on_card", "last_on_card")}
    assert shares == pytest.approx(dict(accuracy=0.4, first_on_card=0.2, last_on_card=0.6))
    assert row["looked_again"] == pytest.approx(0.4)
    assert row["looked_again_if_first_off"] == pytest.approx(0.5)
    assert row["corrected"] == pytest.approx(0.25) and row["first_off_if_wrong"] == 1
    cells = {name: row[f"named_{name}"] for name in ("on_on", "on_off", "off_on", "off_off")}
    assert cells == pytest.approx({"on_on": 0.2, "on_off": 0, "off_on": 0.4, "off_off": 0.4})
    assert row["accuracy_named_off_on"] == 0.5 and row["accuracy_named_off_off"] == 0


def test_answers_in_batches_equal_single_answers():
    vlm = load()
    prompts = [vlm.encode(SCENES[i].image, SCENES[i].question) for i in range(5)]
    for prompt, answer in zip(prompts, ablation_measure.answer_questions(vlm, prompts, 20)):
        alone = vlm.sample(prompt, 1, 20, temperature=0)
        assert answer.texts == alone.texts and answer.ids.equal(alone.ids)


def test_explained_variance_by_hand():
    texts = ["r1 c1 x", "r1 c2 x", "r2 c1 x", "r2 c1 x"]
    group = SimpleNamespace(
        rewards={"attention": torch.tensor([1.0, 0.0, 0.0, 0.0])},
        completions=SimpleNamespace(texts=texts),
    )
    # total 0.75; by rows (1, 0), (0, 0): 0.5 remains; by cells nothing does
    assert ablation_measure.explained_variance([group], 1) == pytest.approx(1 / 3)
    assert ablation_measure.explained_variance([group], 2) == pytest.approx(1)


def test_harder_questions_match_their_names():
    for _, card in ablation_measure.make_questions(5, border=True):
        assert any(v < 16 or v >= 96 for v in ablation_measure.center(card))
    style = ablation_measure.HARDER["small cards"]
    questions = ablation_measure.make_questions(3, **style)
    assert all(card.box[2] - card.box[0] <= 12 for _, card in questions)
    ids = [example.id for example, _ in ablation_measure.make_questions(3)]
    assert ids == ["test-7-0", "test-7-1", "test-7-2"]


def test_control_area_has_the_same_size_and_is_inside_the_image_and_disjoint():
    scenes = Scenes("test", 50)
    for i in range(50):
        target, *others = scenes.layout(i)
        x1, y1, x2, y2 = target.box
        boxes = (ablation_measure.move_to_card(target.box, other) for other in others)
        box = next(box for box in boxes if ablation_measure.disjoint(box, target.box))
        assert (box[2] - box[0], box[3] - box[1]) == (x2 - x1, y2 - y1)
        assert min(box) >= 0 and max(box) <= 112


# --- second looks -----------------------------------------------------------------------------


def chats(careless, count=40):
    """The words of every answer, which of them have a loss, and their weights."""
    tokenizer = second_looks.make_tokenizer(["look"])
    teacher = second_looks.ChainTeacher(tokenizer, seed=0)
    for _ in range(count):
        _, ids, marked, _ = teacher.sample(careless)
        labels, weights = teacher.labels(ids[None], [marked])
        turns = tokenizer.decode(ids).split("<|im_start|> assistant")[1:]
        assistant = tokenizer.convert_tokens_to_ids("assistant")
        starts = [i + 1 for i, token in enumerate(ids) if token == assistant]
        for text, start in zip(turns, starts):
            words = text.split("<|im_end|>")[0].split()
            stop = start + len(words)
            kept = labels[0, start:stop] != -100
            yield words, kept.tolist(), weights[0, start:stop].tolist()


def test_answers_of_stage_1_teach_to_look_again():
    tokenizer = second_looks.make_tokenizer(["look"])
    assert tokenizer.convert_tokens_to_ids("look") == 62
    lengths, wrong_ends = set(), 0
    for words, kept, weights in chats(None):
        looks = words.count("look")
        lengths.add(looks)
        assert len(words) == 6 * looks + 6 and words[6 * looks] == "dot"
        for i in range(looks):
            place = [6 * i + 1, 6 * i + 2]
            assert [weights[k] for k in place] == [second_looks.PLACE_WEIGHT] * 2
            assert kept[6 * i] and kept[6 * i + 4]  # the decision to look, and what is there
            if i < looks - 1:  # wrong: looked again
                assert not kept[place[0]] and not kept[place[1]]
        right = kept[6 * looks - 5]
        assert kept[6 * looks] == right  # the decision to answer
        assert kept[6 * looks + 1]  # the dot of the last card, wrong or not
        wrong_ends += not right
    assert lengths == {1, 2, 3, 4} and 10 < wrong_ends < 60  # 18 % of 160


def test_answers_of_stage_2_are_careless_and_all_words_count():
    counts = [words.count("look") for words, kept, _ in chats(0.8) if all(kept)]
    assert len(counts) == 160 and set(counts) == {1, 2}
    assert 18 <= counts.count(2) <= 55  # 0.8 x (1 - 1 / cards) x 0.35: 23 %


# --- statistics -------------------------------------------------------------------------------


def test_intervals_and_paired_test_by_hand():
    t = 4.30265  # t(0.975, 2)
    assert ablation_stats.half_width([1.0, 2.0, 3.0]) == pytest.approx(t / 3**0.5, rel=1e-5)
    assert ablation_stats.half_width([1.0]) is None
    assert ablation_stats.format_mean([0.25]) == "0.250"
    assert ablation_stats.format_mean([0.0, 0.5, 1.0]) == "0.500 (0.000 to 1.000)"  # ± 1.24
    assert ablation_stats.format_mean([0.5, 0.5, 0.5]) == "0.500 ± 0.000"
    ours, theirs = (
        {seed: {"m": v} for seed, v in enumerate(values)} for values in ([2, 4, 6], [1, 2, 3, 9])
    )  # one seed has no partner
    difference, half, p = ablation_stats.paired_difference(ours, theirs, "m")
    assert difference == 2 and half == pytest.approx(t / 3**0.5, rel=1e-5)
    # t = 2 * 3**0.5 with 2 degrees of freedom: 1 - t / (2 + t * t)**0.5
    assert p == pytest.approx(0.0742, abs=1e-4)


def rate_runs(**accuracies):
    return {
        "runs": [
            dict(kind="rate", arm=arm, rate=rate, validation_accuracy=value)
            for arm, by in accuracies.items()
            for rate, values in by.items()
            for value in values
        ]
    }


def test_each_arm_gets_the_rate_that_is_best_on_average_and_not_at_the_edge():
    results = rate_runs(
        a={1e-4: [0.9, 0.1], 2e-4: [0.6, 0.6], 4e-4: [0.3, 0.3]},
        b={1e-4: [0.9], 2e-4: [0.6]},
        c={1e-4: [0.2], 2e-4: [0.6]},
    )
    assert ablation_stats.chosen_rates(results) == {"a": 2e-4, "b": 1e-4, "c": 2e-4}
    assert ablation_stats.rates_beyond_the_edge(results) == [("b", 5e-5), ("c", 4e-4)]
    many = {2**i * 1e-4: [i] for i in range(ablation_stats.MAX_RATES)}
    assert ablation_stats.rates_beyond_the_edge(rate_runs(a=many)) == []


def test_holms_correction_by_hand():
    assert ablation_stats.holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert ablation_stats.holm([0.5, 0.9]) == pytest.approx([1, 1])


def test_naming_and_reading_add_up_to_the_gain():
    def row(named, on, off):
        return dict(
            accuracy=named * on + (1 - named) * off,
            on_card=named,
            accuracy_if_on_card=on,
            accuracy_if_not_on_card=off,
        )

    only_naming = ablation_report.naming_and_reading(row(0.5, 1, 0), row(0.8, 1, 0))
    assert only_naming == pytest.approx((0.3, 0.3, 0))
    only_reading = ablation_report.naming_and_reading(row(0.5, 0.6, 0.2), row(0.5, 0.8, 0.2))
    assert only_reading == pytest.approx((0.1, 0, 0.1))
    gain, naming, reading = ablation_report.naming_and_reading(
        row(0.5, 0.6, 0.2), row(0.7, 0.9, 0.4)
    )
    assert gain == pytest.approx(naming + reading) and naming > 0 < reading


def run(accuracies, samples, kind="arm", arm="a", seed=0, correlation=0.5):
    curve = [{"step": 20 * (i + 1), "accuracy": value} for i, value in enumerate(accuracies)]
    row = dict(kind=kind, arm=arm, seed=seed, steps=len(samples), rate=1e-3, curve=curve)
    related = [correlation] * len(samples)
    metrics = {"rewards/accuracy/mean": samples, "attention/corr_accuracy": related}
    return row, {ablation_stats.run_key(row): metrics}


def test_a_collapse_is_lasting():
    assert ablation_collapse.collapse_step(run([0.8, 0.85, 0.6, 0.5], [])[0]) == 60
    assert ablation_collapse.collapse_step(run([0.8, 0.6, 0.8], [])[0]) is None  # recovers
    assert ablation_collapse.collapse_step(run([0.8, 0.7, 0.65], [])[0]) is None
    assert ablation_collapse.largest_loss(run([0.8, 0.7, 0.9, 0.65], [])[0]) == pytest.approx(0.25)


def test_combinations_of_looks_are_pooled_over_seeds():
    """A seed without answers in a cell does not lower the accuracy there."""
    rows = [{}, {}]
    for cell, shares, right in (("on_on", (0.5, 0.25), (0.8, 0.4)), ("off_on", (0.2, 0), (0.9, 0))):
        for row, share, accuracy in zip(rows, shares, right):
            row |= {f"looks_{cell}": share, f"accuracy_looks_{cell}": accuracy}
    for row in rows:
        row |= dict.fromkeys(("looks_on_off", "accuracy_looks_on_off"), 0)
        row |= dict.fromkeys(("looks_off_off", "accuracy_looks_off_off"), 0)
    expected = ["0.375 (0.67)", "0", "0.100 (0.90)", "0"]  # (0.5 * 0.8 + 0.25 * 0.4) / 0.75
    assert ablation_report.two_by_two(rows, "looks") == expected


def test_the_kept_adapter_is_that_of_the_most_right_samples():
    """--keep_best compares the means of 20 steps each."""
    row, metrics = run([0.6, 0.7, 0.2], [0.5] * 20 + [0.8] * 20 + [0.9] * 10 + [0.1] * 10)
    assert ablation_collapse.kept_accuracy(row, *metrics.values()) == 0.7


def test_the_arms_of_second_looks_train_in_the_tiny_world(tmp_path, monkeypatch):
    """The model lies in another folder, and another version of transformers may have saved it."""
    saved = json.loads((ROOT / "tiny" / "config.json").read_text())
    saved["transformers_version"] = "6.0"
    (tmp_path / "config.json").write_text(json.dumps(saved))
    monkeypatch.setitem(second_looks.SETTINGS, "model_name_or_path", str(tmp_path))
    settings = TINY | ablation_arms.PAPER | second_looks.SETTINGS
    settings |= {"learning_rate": 0.5, "eval_examples": 0}
    for name, arm in ablation_arms.looks_arms().items():
        rate = ["--learning_rate", "0.5"]  # an arm must not change the rate of its run
        flags = [*ablation_arms.COMMON_FLAGS, *rate, *arm.flags, "--output_dir", "x"]
        with arm.change(0):  # which adds rewards
            cfg = parse_config(flags)
            train_set, _ = sources.load_datasets(cfg)
        assert f"--reward_weights={cfg.reward_weights}" in "=".join(ablation_arms.ARMS[name].flags)
        assert {setting: getattr(cfg, setting) for setting in settings} == settings
        example = train_set[0]
        assert example.image.size == (112, 112) and "color is the dot" in example.question


def test_the_moments_of_a_collapse_are_counted_from_it():
    base = dict(kind="arm", arm="base", seed=0, steps=0, rate=0.0)
    base["curve"] = [{"step": 0, "accuracy": 0.6}]
    row, training = run(
        [0.8, 0.9, 0.6, 0.3, 0.2], [0.5] * 40 + [0.4] * 60, "length", ablation_arms.SAYO
    )
    for point in row["curve"]:
        names = "on_card", "accuracy_if_on_card", "accuracy_if_not_on_card"
        point |= dict.fromkeys(names, point["accuracy"] / 2)
    results = {
        "runs": [base, row, *run([0.8] * 5, [0.5] * 100, "length", ablation_arms.SAYO, 1)[:1]]
    }
    table = ablation_collapse.collapse_table(results, training)
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    found = {line[0]: line[1:3] + line[6:7] for line in lines[2:]}
    assert found == {
        "step 20 (1)": ["0.80", "0.40", "0.50"],
        "40 steps before (1)": ["0.80", "0.40", "0.50"],
        "20 steps before (1)": ["0.90", "0.45", "0.50"],
        "0.2 lost (1)": ["0.60", "0.30", "0.40"],
        "40 steps after (1)": ["0.20", "0.10", "0.40"],
        "last step (1)": ["0.20", "0.10", "0.40"],
    }


def test_the_alarm_is_judged_against_the_collapse():
    base = dict(kind="arm", arm="base", seed=0, steps=0, rate=0.0)
    base["curve"] = [{"step": 0, "accuracy": 0.6}]
    early = run([0.8, 0.8, 0.5], [0.5] * 20 + [0.8] * 16 + [0.3] * 24, seed=5)  # step 41
    late = run([0.8, 0.5, 0.5], [0.8] * 60, seed=6)
    healthy = run([0.8, 0.8, 0.8], [0.8] * 60, seed=7)
    false = run([0.8, 0.8, 0.8], [0.8] * 40 + [0.5] * 20, seed=8)
    from_base = run([0.3, 0.3, 0.3], [0.6] * 20 + [0.2] * 40, seed=9)  # too late, at step 26
    misled = run([0.3, 0.3, 0.3], [0.6] * 20 + [0.2] * 40, seed=10, correlation=-0.1)  # at step 8
    between = run([0.8, 0.8, 0.68], [0.8] * 60, seed=11)  # neither collapsed nor healthy
    seen = run([0.8, 0.8, 0.8], [0.8] * 60, seed=4)
    rows, training = [base], {}
    for row, metrics in (early, late, healthy, false, from_base, misled, between, seen):
        rows.append(row)
        training |= metrics
    counts = ablation_collapse.alarm_counts({"runs": rows}, training)
    numbers = dict(collapsed=4, caught=2, early=2, healthy=2, false=1, between=1, warned=0)
    assert counts["arm"] == numbers
    assert counts[ablation_collapse.CHOSEN_ON] == dict.fromkeys(numbers, 0) | {"healthy": 1}
    table = ablation_collapse.alarm_table({"runs": rows}, training)
    assert "| all others | 4 | 2 (50 %) | 2 (50 %) | 2 | 1 (50 %) | 1 | 0 (0 %) |" in " ".join(
        table.split()
    )
    assert "| all | 4 | 2 (50 %) | 2 (50 %) | 3 | 1 (33 %) | 1 | 0 (0 %) |" in " ".join(
        table.split()
    )
    # Between 0.8 at step 40 and 0.5 at step 60, whose best is 0.8.
    assert ablation_collapse.lost_at(early[0], 50) == pytest.approx(0.15)


# --- documents --------------------------------------------------------------------------------


def test_insert_replaces_the_text_between_its_comments(tmp_path):
    path = tmp_path / "doc.md"
    path.write_text("a\n<!-- x -->\nold\n<!-- end x -->\nb\n")
    insert(path, "x", "new")
    assert path.read_text() == f"a\n{marked('x', 'new')}\nb\n"
    with pytest.raises(SystemExit, match="doc.md has no comments <!-- y -->"):
        insert(path, "y", "new")


def test_documents_show_the_committed_results():
    results = json.loads((ROOT / "bench" / "results" / "ablation.json").read_text())
    evidence = (ROOT / "docs" / "evidence.md").read_text()
    training = ablation.load_training(ROOT / "bench" / "results" / "ablation.json")
    for name, text in ablation_report.tables(results, training).items():
        assert marked(name, text) in evidence, name
    assert marked("study reading", ablation_claims.reading(results, training)) in evidence
    for sentence, holds in ablation_claims.claims(results, training):
        assert holds, sentence
    changes = marked("study try this", ablation_report.try_this_table(results))
    assert changes in (ROOT / "docs" / "algorithm.md").read_text()
    readme = (ROOT / "README.md").read_text()
    assert marked("results", ablation_report.readme_table(results)) in readme
