"""The study: its placebos are what they claim, its numbers are worked out right, and the README says what was found."""

import json
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from conftest import load

import reward
import sayo_mini
from bench import ablation, measure, report
from scenes import Scenes

ROOT = Path(__file__).parent.parent
SCENES = Scenes("validation", 20)


# --- arms ------------------------------------------------------------------------------------------------------------


def test_the_rolled_box_is_as_large_and_elsewhere():
    for example in SCENES:
        true = sayo_mini.example_region(example, (7, 7))
        with ablation.rolled():
            wrong = sayo_mini.example_region(example, (7, 7))
        assert wrong.sum() == true.sum() and not (wrong & true).any()
    assert sayo_mini.example_region(example, (7, 7)).equal(true)  # and only while it is asked to


def test_dealt_scores_are_the_groups_own_in_another_order():
    region, selected = torch.arange(4) < 2, torch.ones(6, 3, dtype=torch.bool)
    attention = torch.rand(6, 3, 4, generator=torch.Generator().manual_seed(0))
    true = reward.attention_reward(attention, region, selected)
    with ablation.shuffled(seed=1):
        dealt = [reward.attention_reward(attention, region, selected) for _ in range(3)]
    assert all(sorted(d.tolist()) == sorted(true.tolist()) for d in dealt)
    assert not dealt[0].equal(dealt[1]) and any(not d.equal(true) for d in dealt)
    with ablation.shuffled(seed=1):
        assert reward.attention_reward(attention, region, selected).equal(dealt[0])


def test_length_and_lowest_do_what_they_say():
    with ablation.length():
        assert reward.format_reward("no tags", 9, 10, 18) == 0.5
    entropy, mask = torch.tensor([[1.0, 3.0, 2.0, 0.5]]), torch.tensor([[True, True, True, False]])
    with ablation.lowest():
        assert reward.select_tokens(entropy, mask, 0.34).tolist() == [[True, False, False, False]]
    assert reward.select_tokens(entropy, mask, 0.34).tolist() == [[False, True, False, False]]


FOUND = {
    "query": {"auroc": [[0.5, 0.6, 0.55], [0.7, 0.4, 0.9], [1, 1, 1]], "gap": [[0.1, 0, 1], [0.2, 0.3, 1], [1, 1, 1]]},
    "predict": {"auroc": [[0.5, 0.6, 0.8], [0.7, 0.4, 0.6], [1, 1, 1]], "gap": [[0, 0.4, 1], [0, 0, 1], [1, 1, 1]]},
}


def test_the_probe_decides_layers_and_heads_without_the_sums():
    assert ablation.telling_head(FOUND) == {"alignment": "predict", "layers": 0, "heads": 1}
    flags = ablation.variants(FOUND)
    assert flags["best three heads (0,1 of layer 1)"][-4:] == ["--layers", "1", "--heads", "0,1"]
    assert flags["most telling head (predict, 1 of layer 0)"][-6:] == [
        "--alignment", "predict", "--layers", "0", "--heads", "1"]  # fmt: skip


def test_every_arm_is_a_command_line_of_the_program(tmp_path):
    for flags in (ablation.ARMS | ablation.variants(FOUND)).values():
        sayo_mini.parse([*ablation.FLAGS, *flags, "--output_dir", str(tmp_path / "none")])


def test_weights_unpacked_once_give_the_same_run_to_the_bit(tmp_path):
    flags = [*ablation.FLAGS, "--max_steps", "2", "--prompts_per_step", "1", "--learning_rate", "1e-3"]
    assert sayo_mini.main([*flags, "--output_dir", str(tmp_path / "usual")]) == 0
    with ablation.unpack_once():
        assert sayo_mini.main([*flags, "--output_dir", str(tmp_path / "once")]) == 0
    for name in ("metrics.jsonl", "samples.jsonl", "adapter/adapter_model.safetensors"):
        assert (tmp_path / "usual" / name).read_bytes() == (tmp_path / "once" / name).read_bytes()


def test_a_worker_trains_through_the_program_and_adds_its_row(tmp_path, capfd):
    """Two arms and the base, one step each: rows, curves, and nothing done twice."""
    sizes = {"accuracy": 3, "sampled": 2, "harder": 1, "gaze": 2, "causal": 2, "groups": 2}
    telling, short = ablation.telling_head(FOUND), ["--max_steps", "1", "--prompts_per_step", "1"]
    jobs = [("arm", name, flags, 0, tmp_path / name, sizes, telling) for name, flags in
            (("base", None), (ablation.SAYO, ablation.weights(1, 1, 0) + short), ("length", short))]  # fmt: skip
    args, results = Namespace(jobs=2, results=tmp_path / "results.json"), {"runs": []}
    ablation.run_all(jobs, args, results)
    ablation.run_all(jobs, args, results)
    saved = json.loads(args.results.read_text())
    assert saved == results and sorted(row["arm"] for row in saved["runs"]) == sorted(["base", ablation.SAYO, "length"])
    for row in saved["runs"]:
        assert ("curve" in row) == (row["arm"] != "base")
        assert all(isinstance(v, float | int) for v in row["measured"].values())
    assert (tmp_path / ablation.SAYO / "adapter" / "adapter_config.json").exists()


# --- measurements ----------------------------------------------------------------------------------------------------


def test_answers_in_batches_equal_answers_one_by_one():
    vlm = load()
    examples = [SCENES[i] for i in range(5)]
    together = measure.write(vlm, examples, 20, batch=3)
    for example, answer in zip(examples, together):
        alone = vlm.sample(vlm.encode(example.image, example.question), 1, 20, temperature=0)
        assert answer.texts == alone.texts and answer.ids.equal(alone.ids)


def test_harder_questions_are_what_they_are_called():
    for _, card in measure.questions(5, border=True):
        assert any(v < 16 or v >= 96 for v in measure.center(card))
    assert all(card.box[2] - card.box[0] <= 12 for _, card in measure.questions(3, **measure.HARDER["small cards"]))
    assert [e.id for e, _ in measure.questions(3)] == ["test-7-0", "test-7-1", "test-7-2"]


def test_the_other_place_painted_over_is_as_large_inside_and_apart():
    scenes = Scenes("test", 50)
    for i in range(50):
        target, *others = scenes.layout(i)
        box = next(b for b in (measure.shift(target.box, o) for o in others) if measure.apart(b, target.box))
        assert (box[2] - box[0], box[3] - box[1]) == (target.box[2] - target.box[0], target.box[3] - target.box[1])
        assert min(box) >= 0 and max(box) <= 112


# --- statistics ------------------------------------------------------------------------------------------------------


def test_intervals_and_paired_test_by_hand():
    assert report.half_width([1.0, 2.0, 3.0]) == pytest.approx(4.30265 / 3**0.5, rel=1e-5)  # t(0.975, 2) = 4.30265
    assert report.half_width([1.0]) is None and report.cell([0.25]) == "0.250"
    ours, theirs = ({s: {"m": v} for s, v in enumerate(vs)} for vs in ([2, 4, 6], [1, 2, 3, 9]))  # one seed unpaired
    difference, half, p = report.paired(ours, theirs, "m")
    assert difference == 2 and half == pytest.approx(4.30265 / 3**0.5, rel=1e-5)
    assert p == pytest.approx(0.0742, abs=1e-4)  # t = 2 * 3**0.5, 2 degrees of freedom: 1 - t / (2 + t * t)**0.5


def test_the_rate_is_the_best_on_average_over_both_arms():
    runs = [{"kind": "choice", "arm": f"{rate} {arm}", "validation_accuracy": value} for rate, arm, value in
            (("1e-4", "x", 0.9), ("1e-4", "y", 0.1), ("2e-4", "x", 0.6), ("2e-4", "y", 0.6))]  # fmt: skip
    assert report.best_rate({"runs": runs}) == "2e-4"


def test_the_readme_says_what_the_results_say():
    results = json.loads((ROOT / "bench" / "results" / "ablation.json").read_text())
    assert report.tables(results, ablation.SAYO, ablation.OTHERS) in (ROOT / "README.md").read_text()
    page = (ROOT / "bench" / "README.md").read_text()
    for kind in ("arm", "variant"):
        assert report.everything(results, kind, [ablation.SAYO, *ablation.OTHERS]) in page
