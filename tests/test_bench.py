"""The ablation: the placebos do what they claim, the statistics are correct, and the documents
show the committed results."""

import json
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from conftest import ask, load

import reward
import sayo_mini
from bench import ablation, ablation_arms, ablation_measure, ablation_report
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

    def rewards(arm):
        with ablation_arms.patch_for(arm, seed=1):
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
    flags = ablation_arms.variant_arms(PROBE_RESULTS)
    best = flags["best three heads (layer 1, heads 0,1)"]
    assert best[-4:] == ["--layers", "1", "--heads", "0,1"]
    single = flags["most discriminative head (layer 0, head 1, predict)"]
    assert single[-6:] == ["--alignment", "predict", "--layers", "0", "--heads", "1"]


def test_every_arm_is_a_valid_command_line(tmp_path):
    arms = ablation_arms.ARMS | ablation_arms.variant_arms(PROBE_RESULTS)
    for flags in arms.values():
        output = ["--output_dir", str(tmp_path / "none")]
        parse_config([*ablation_arms.COMMON_FLAGS, *flags, *output])


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
def test_jobs_train_through_the_program_and_add_their_rows(tmp_path, capfd):
    """Two arms run one step each, next to the base; every job adds one row and never runs twice."""
    sizes = dict(accuracy=3, sampled=2, harder=1, attention=2, causal=2, groups=2)
    head = ablation_arms.discriminative_head(PROBE_RESULTS)
    short = ["--max_steps", "1", "--prompts_per_step", "1"]
    arms = {
        "base": None,
        ablation_arms.SAYO: ablation_arms.weight_flags(1, 1, 0) + short,
        ablation_arms.LENGTH: short,
    }
    jobs = [
        ablation.Job("arm", name, flags, 0, tmp_path / name, sizes, head)
        for name, flags in arms.items()
    ]
    args, results = Namespace(jobs=2, results=tmp_path / "results.json"), {"runs": []}
    ablation.run_jobs(jobs, args, results)
    ablation.run_jobs(jobs, args, results)
    saved = json.loads(args.results.read_text())
    assert saved == results
    assert sorted(row["arm"] for row in saved["runs"]) == sorted(arms)
    for row in saved["runs"]:
        assert ("curve" in row) == (row["arm"] != "base")
        assert all(isinstance(v, float | int) for v in row["measured"].values())
    assert (tmp_path / ablation_arms.SAYO / "adapter" / "adapter_config.json").exists()


# --- measurements -----------------------------------------------------------------------------


def test_answers_in_batches_equal_single_answers():
    vlm = load()
    examples = [SCENES[i] for i in range(5)]
    batched = ablation_measure.generate_answers(vlm, examples, 20, batch=3)
    for example, answer in zip(examples, batched):
        prompt = vlm.encode(example.image, example.question)
        alone = vlm.sample(prompt, 1, 20, temperature=0)
        assert answer.texts == alone.texts and answer.ids.equal(alone.ids)


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


# --- statistics -------------------------------------------------------------------------------


def test_intervals_and_paired_test_by_hand():
    t = 4.30265  # t(0.975, 2)
    assert ablation_report.half_width([1.0, 2.0, 3.0]) == pytest.approx(t / 3**0.5, rel=1e-5)
    assert ablation_report.half_width([1.0]) is None
    assert ablation_report.format_mean([0.25]) == "0.250"
    ours, theirs = (
        {seed: {"m": v} for seed, v in enumerate(values)} for values in ([2, 4, 6], [1, 2, 3, 9])
    )  # one seed has no partner
    difference, half, p = ablation_report.paired_difference(ours, theirs, "m")
    assert difference == 2 and half == pytest.approx(t / 3**0.5, rel=1e-5)
    # t = 2 * 3**0.5 with 2 degrees of freedom: 1 - t / (2 + t * t)**0.5
    assert p == pytest.approx(0.0742, abs=1e-4)


def test_the_chosen_learning_rate_is_the_best_on_average_over_both_arms():
    accuracy = [("1e-4", "x", 0.9), ("1e-4", "y", 0.1), ("2e-4", "x", 0.6), ("2e-4", "y", 0.6)]
    runs = [
        {"kind": "learning rate", "arm": f"{rate} {arm}", "validation_accuracy": value}
        for rate, arm, value in accuracy
    ]
    assert ablation_report.best_learning_rate({"runs": runs}) == "2e-4"


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
    for name, text in ablation_report.doc_tables(results).items():
        assert marked(name, text) in evidence, name
    readme = (ROOT / "README.md").read_text()
    assert marked("results", ablation_report.readme_table(results)) in readme
