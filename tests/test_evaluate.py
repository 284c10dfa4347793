"""evaluate.py: the results of an evaluation, attention maps as text, and the table."""

import json
import math
import zlib
from dataclasses import replace
from itertools import count

import pytest
import torch
from conftest import ask, load
from scipy.stats import t as student

import evaluate as module
import reward
from config import TINY, Config, InputError, parse_command_line
from data import example_region, region_mask
from evaluate import estimate, evaluate, pack_map, sign_test, trace_attention, unpack_map, verdict
from model import Completions
from scenes import Scenes

CFG, INF = Config(**TINY), math.inf


@pytest.fixture(scope="module")
def vlm():
    return load()


def test_a_row_has_the_answer_and_where_the_model_looked(vlm):
    scenes = Scenes("validation", 3)
    rows = evaluate(vlm, scenes, CFG, "before")
    assert json.loads(json.dumps(rows)) == [row | {"grid": [7, 7]} for row in rows]
    for i, row in enumerate(rows):
        example, following = scenes[i], scenes[(i + 1) % 3]
        prompt = vlm.encode(example.image, f"{example.question} {CFG.instruction}".strip())
        trace = trace_attention(vlm, prompt, CFG)
        region, other = (example_region(x, (7, 7)) for x in (example, following))
        text, words = trace.completion.texts[0], module.written_words(vlm, trace.completion)
        thoughts = torch.arange(len(words)) < [word.strip() for word in words].index("<answer>")
        early, late = reward.early_and_late(trace.attention, region, thoughts)
        permuted = reward.early_and_late(trace.attention, other, thoughts)
        exact = dict(id=example.id, question=example.question, answer=example.answer, text=text)
        exact |= dict(image=zlib.crc32(example.image.tobytes()), words=words, length=len(words))
        exact |= dict(ids=trace.completion.ids[0].tolist(), selected=trace.selected.tolist())
        exact |= dict(grid=(7, 7), correct=reward.accuracy_reward(text, example.answer))
        exact |= dict(early=early, late=late, permuted_early=permuted[0], permuted_late=permuted[1])
        assert {name: row[name] for name in exact} == exact
        scores = reward.localization(trace.map, region)
        close = scores | {f"fixed_{name}": value for name, value in scores.items()}  # the same text
        close |= dict(area=region.float().mean().item(), to_image=trace.attention.sum(1).tolist())
        close |= dict(to_region=trace.attention[:, region].sum(1).tolist())
        close |= dict(permuted_auroc=reward.localization(trace.map, other)["auroc"])
        for name, value in close.items():
            assert row[name] == pytest.approx(value, abs=1e-4), name
        looks = reward.look_maps(trace.attention, thoughts)
        maps = [*trace.attention.tolist(), *(look.tolist() for look in looks)]
        for packed, cells in zip(row["maps"] + row["look_maps"], maps, strict=True):
            # Batches may differ in the last bit, and so in the level of a cell.
            assert unpack_map(packed) == pytest.approx(unpack_map(pack_map(cells)), abs=2e-3)
        assert row.keys() == {*exact, *close, "maps", "look_maps"}


def test_fixed_text_is_the_earlier_answer_at_the_tokens_selected_then(vlm):
    scenes = Scenes("validation", 2)
    # An earlier evaluation by a different model, which uses one head and stops after nine tokens.
    before = evaluate(load(heads=(0,)), scenes, CFG, "before")
    for row in before:
        row["ids"], row["selected"] = row["ids"][:9], [False, True, True] * 3
    after = evaluate(vlm, scenes, CFG, "after", before)
    for example, earlier, row in zip(scenes, before, after):
        prompt = vlm.encode(example.image, f"{example.question} {CFG.instruction}".strip())
        ids = torch.tensor([earlier["ids"]])
        with torch.no_grad():
            scores = vlm.score(prompt, Completions(ids, torch.ones_like(ids).bool()))
        rows = reward.align_attention(scores.attention, scores.prompt_attention, CFG.alignment)[0]
        chosen = rows[torch.tensor(earlier["selected"])].mean(0)
        expected = reward.localization(chosen, region_mask(example.boxes, (112, 112), (7, 7)))
        for name, value in expected.items():
            assert row[f"fixed_{name}"] == pytest.approx(value, abs=1e-5), name
        assert row["fixed_mass_over_area"] != pytest.approx(row["mass_over_area"], abs=1e-3)


def test_the_size_of_a_batch_does_not_change_the_results(vlm, monkeypatch):
    """Batches of two, in which the fifth question is alone, and one batch of five."""
    scenes, runs, decoded, cfg = Scenes("validation", 5), [], [], replace(CFG, num_generations=2)
    sample = vlm._sample
    monkeypatch.setattr(vlm, "_sample", lambda *a: decoded.append(len(a[0])) or sample(*a))
    for tokens, questions in ((200, 2), (4096, 5)):
        monkeypatch.setattr("model.TOKENS_PER_FORWARD", tokens)
        cfg.prompts_per_step = questions
        before = evaluate(vlm, scenes, cfg, "before")
        with vlm.model.disable_adapter():
            after = evaluate(vlm, scenes, cfg, "after", before)
        names = "auroc", "permuted_auroc", "image_mass"
        numbers = [[x[name] for name in names] + [y["fixed_auroc"]] for x, y in zip(before, after)]
        runs.append(([(x["id"], x["text"]) for x in before], numbers))
    assert decoded == [4, 1, 4, 1, 5, 5]  # as many rows as training, not as in a trace
    assert runs[0][0] == runs[1][0] and len({text for _, text in runs[0][0]}) > 2
    assert [id for id, _ in runs[0][0]] == [example.id for example in scenes]
    for in_twos, at_once in zip(runs[0][1], runs[1][1]):
        assert in_twos == pytest.approx(at_once, abs=1e-4)


def test_a_trace_selects_the_tokens_with_the_highest_entropy(vlm):
    prompt, completion = ask(vlm, G=1)
    trace = trace_attention(vlm, prompt, replace(CFG, token_fraction=0.5), completion)
    selected = reward.select_tokens(trace.entropy[None], completion.mask, 0.5)[0]
    assert torch.equal(trace.selected, selected) and trace.completion is completion
    assert torch.equal(trace.map, trace.attention[selected].mean(0))


@pytest.mark.parametrize("name", ["logps", "attention"])
def test_output_that_is_not_finite_is_an_error(vlm, monkeypatch, name):
    prompt, completion = ask(vlm, G=1)
    with torch.no_grad():
        (scores,) = vlm.score_groups([prompt], [completion])
    getattr(scores, name).flatten()[3] = math.nan
    monkeypatch.setattr(vlm, "score_groups", lambda *_: [scores])
    with pytest.raises(InputError, match="not finite .* --no-load_in_4bit"):
        trace_attention(vlm, prompt, CFG, completion)


def test_words_are_what_each_token_adds_to_the_text(vlm):
    prompt, completion = ask(vlm, G=1, temperature=0)
    words = module.written_words(vlm, completion)
    assert len(words) == completion.ids.shape[1] and "".join(words) == completion.texts[0]
    ids = torch.cat([completion.ids[:, :2], vlm.stop_ids[None, :1]], 1)
    text = vlm.tokenizer.decode(ids[0], skip_special_tokens=True)
    first, second, end = module.written_words(vlm, Completions(ids, ids > 0, [text]))
    assert first + second == text and first and second and end == ""


def test_a_packed_map_has_the_largest_value_and_64_levels():
    # The levels are 63 times the square root of 0, 1/4, 1 and 1/100: 0, 31.5 (even: 32), 63, 6.3.
    assert pack_map([0.0, 0.125, 0.5, 0.005, -1.0]) == [0.5, "0W_60"]  # W is 32, _ is 63
    assert pack_map([0.0, 0.0]) == [1e-12, "00"] and pack_map([2e-6, 0.0]) == [2e-6, "_0"]
    assert len(set(module.LEVELS)) == 64
    values = torch.rand(500, generator=torch.Generator().manual_seed(0)).tolist()
    assert unpack_map(pack_map(values)) == pytest.approx(values, abs=1 / 63)


@pytest.mark.parametrize("cells, grid", [(192, (4, 2)), (50, (4, 2)), (12, (2, 2)), (2, (1, 1))])
def test_maps_of_long_answers_are_pooled(vlm, monkeypatch, cells, grid):
    monkeypatch.setattr(module, "MAX_CELLS", cells)
    (prompt, completion), scene = ask(vlm, G=1, C=3), Scenes("validation", 1)[0]
    example = replace(scene, boxes=[(0, 0, 112, 28)])  # the first of four rows
    attention = torch.arange(24.0).view(3, 8) / 100  # three tokens, a grid of 4 x 2
    trace = module.AttentionTrace(completion, attention, torch.zeros(3), torch.ones(3).bool())
    row = module.result_row(vlm, example, replace(prompt, grid=(4, 2)), trace, trace, scene)
    assert row["grid"] == grid and len(row["maps"]) == 3
    assert row["to_region"] == pytest.approx([0.01, 0.17, 0.33])
    assert row["to_image"] == pytest.approx([0.28, 0.92, 1.56])
    for packed, cells in zip(row["maps"], attention):
        expected = cells.view(grid[0], 4 // grid[0], grid[1], 2 // grid[1]).mean((1, 3)).flatten()
        assert unpack_map(packed) == pytest.approx(expected.tolist(), abs=5e-3)


def test_a_row_tells_the_first_look_from_the_last(vlm):
    """Of twenty words, three are looks: the first one at the region, the last one elsewhere."""
    ids = vlm.tokenizer("look " * 20, return_tensors="pt").input_ids
    completion = Completions(ids, torch.ones_like(ids).bool(), [vlm.tokenizer.decode(ids[0])])
    attention = torch.full((20, 8), 0.125)
    attention[[2, 9, 15]] = torch.eye(8)[[0, 3, 7]]
    scene = replace(Scenes("validation", 1)[0], boxes=[(0, 0, 112, 28)])  # the first of four rows
    following = replace(scene, boxes=[(0, 84, 112, 112)])
    trace = module.AttentionTrace(completion, attention, torch.zeros(20), torch.ones(20).bool())
    prompt = replace(ask(vlm, G=1, C=1)[0], grid=(4, 2))
    row = module.result_row(vlm, scene, prompt, trace, trace, following)
    assert (row["early"], row["late"], row["permuted_early"], row["permuted_late"]) == (1, 0, 0, 1)
    assert [unpack_map(packed) for packed in row["look_maps"]] == torch.eye(8)[[0, 7]].tolist()


def interval(values, *args, **kwargs):
    """The interval of values that belong to different images."""
    return module.confidence_interval(values, range(len(values)), *args, **kwargs)


def test_confidence_intervals():
    # Wilson, 8 of 10: center (0.8 + 1.9208 / 10) / 1.38416,
    # half width 1.96 sqrt(0.016 + 0.009604) / 1.38416.
    assert interval([1.0] * 8 + [0.0] * 2, proportion=True) == "0.800 [0.490, 0.943]"
    # The normal interval would have zero width.
    assert interval([1.0] * 10, proportion=True) == "1.000 [0.722, 1.000]"
    # The mean is 2, the standard error sqrt(4 / 5 / 6); t is about 2.57 for 5 degrees of freedom.
    assert interval([1.0, 2.0, 3.0, math.nan] * 2, largest=INF) == "2.000 [1.070, 2.930]"
    assert interval([1.0] * 5) == "1.000" and interval([math.nan]) == "-"
    # Inside the range, Student's interval is used: 0.5 +- 2.55 * 0.1 * sqrt(4 / 5 / 6).
    assert interval([0.4, 0.5, 0.6] * 2) == "0.500 [0.407, 0.593]"
    for v in (5, 9, 100):
        assert module.student_t(v) == pytest.approx(student.ppf(0.975, v), rel=0.01)
    # Student's interval is [-0.136, 0.636], so Wilson's for 2 of 8 is used: center
    # (0.25 + 1.9208 / 8) / 1.4802, half width 1.96 sqrt(0.023437 + 0.015006) / 1.4802 = 0.2596.
    assert interval([0.0] * 6 + [1.0] * 2) == "0.250 [0.071, 0.591]"
    assert interval([1 + 1e-15] * 6) == "1.000 [0.610, 1.000]"
    # 2 +- 2.55 * sqrt(120 / 5 / 6), clipped at 0; a ratio has no upper bound.
    assert interval([0.0] * 5 + [12.0], largest=INF) == "2.000 [0.000, 7.095]"


NUMBERS = count()


def results(number, *args, **changed):
    return [result(*args, **changed) for _ in range(number)]


def result(correct=1.0, auroc=0.5, early=1.0, late=1.0, **changed):
    names = "permuted_auroc mass_over_area pointing tas image_mass fixed_auroc fixed_mass_over_area"
    row = dict.fromkeys(names.split(), 0.5) | dict(area=0.1, length=13)
    row |= dict(correct=correct, auroc=auroc, early=early, late=late, image=next(NUMBERS))
    return row | {"permuted_early": 0.0, "permuted_late": 1.0} | changed


def test_rows_of_the_table():
    before = results(5, 0.0, 0.4) + [result(0.0, 0.4, area=0.7)]
    after = results(6, 1.0, 0.9)
    rows = module.table_rows(before, [row | {"length": 110, "tas": 0.75} for row in after])
    half, perfect = "0.500 [0.500, 0.500]", "1.000 [0.610, 1.000]"
    assert rows == [
        ("greedy accuracy", "0.000 [0.000, 0.390]", perfect, ""),
        ("attention on the region, AUROC", "0.400 [0.400, 0.400]", "0.900 [0.900, 0.900]", "0.500"),
        ("  with the next example's box", half, half, "0.500"),
        ("  mass / area", half, half, "1.000"),
        ("  pointing game", half, half, "0.200"),  # the mean area
        ("  TAS", half, "0.750 [0.750, 0.750]", "0.500"),
        ("the same on fixed text, AUROC", half, half, "0.500"),
        ("  mass / area", half, half, "1.000"),
        ("first look on the region", perfect, perfect, "0.000"),
        ("last look on the region", perfect, perfect, "1.000"),
        ("attention to the whole image", half, half, ""),
        ("answer length, tokens", "13.000 [13.000, 13.000]", "110.000 [110.000, 110.000]", ""),
    ]
    header, *lines = module.results_table(before, before).splitlines()[:13]
    assert header.split() == ["held-out", "examples:", "6", "before", "after", "chance"]
    assert len({len(line) for line in [header, *lines]}) == 1


def test_few_examples_show_their_numbers_without_intervals():
    before, after = results(5, auroc=math.nan), results(5)
    *lines, dash = module.results_table(before, after).splitlines()[:14]
    assert "1.000" in lines[1] and "[" not in "".join(lines)
    assert dash.startswith("-: the AUROC is undefined")


def test_the_verdict_tests_the_same_questions():
    """Two questions about one image count as one: of seven images, two got better."""
    before = [(0, 0.4, 0, 0), (0, 0.4, 0, 0), (0, 0.5, 1, 1), *[(1, 0.6, 0, 1)] * 5]
    after = [(1, 0.6, 0, 1), (1, 0.6, 0, 1), (1, 0.7, 1, 1), *[(1, 0.8, 0, 1)] * 5]
    before, after = (
        [result(*x, image=i, fixed_auroc=x[1] - 0.15) for x, i in zip(rows, (1, *range(1, 8)))]
        for rows in (before, after)
    )
    answers, looks, attention = verdict(before, after).splitlines()
    assert answers == (
        "Answers: 5 right before, 8 right after, of 8; 3 fixed, 0 broken "
        "(exact sign test, p = 0.5)."  # 2 / 2^2
    )
    region = "First looks off the region (the box around what is asked about): "
    assert looks == f"{region}7 before (5 corrected), 7 after (7 corrected)."
    assert "by +0.20 [+0.20, +0.20] while the model writes its own answers, and" in attention
    assert "by +0.05 [+0.05, +0.05] while it reads its answers from before" in attention


WRITES = "the model learned to write differently; on the same words, no gain is shown"
SAME_WORDS = "the model looks at the region more while it reads the same words"
NOTHING = "nothing shows that the model looks at the region more than before"


@pytest.mark.parametrize(
    "own, fixed, conclusion",
    [
        ((0.2, 0.3), (0.0, 0.0), WRITES),
        ((0.2, 0.3), (-0.004, 0.003), WRITES),
        ((0.2, 0.3), (0.004, 0.004), WRITES),  # significant, but printed as zero
        ((0.2, 0.3), (-0.2, -0.3), WRITES),
        ((0.2, 0.3), (0.1, 0.1), SAME_WORDS),
        ((-0.1, 0.2), (0.1, 0.1), SAME_WORDS),
        ((-0.1, 0.2), (-0.1, 0.2), NOTHING),
        ((-0.2, -0.3), (0.0, 0.0), NOTHING),
        ((0.2, math.nan), (0.0, math.nan), "no conclusion, because fewer than 6 images count"),
    ],
)
def test_the_verdict_concludes_from_the_intervals_that_it_prints(own, fixed, conclusion):
    after = [result(auroc=0.5 + x, fixed_auroc=0.5 + y) for x, y in list(zip(own, fixed)) * 3]
    before = [result(image=row["image"]) for row in after]
    attention = verdict(before, after).splitlines()[2]
    assert attention.startswith(f"Attention: {conclusion}. ") and "-0.00" not in attention


def test_a_run_begins_with_what_its_evaluation_can_show():
    def lines(questions, **settings):
        cfg = Config(**settings)
        return module.opening_lines(Scenes("train", 20), Scenes("test", questions), cfg)

    data, answers = lines(60, max_steps=15).splitlines()
    assert data == (
        "training: 20 questions about 20 images in 15 steps (epochs: 3); held out: 60 questions "
        "about 60 images: a change of accuracy below 0.100 cannot be significant"
    )
    assert "not rewarded, as in the paper" in answers and "--keep_best" in answers
    parse_command_line([answers.split("; ")[1].split(" rewards")[0].replace(" ", "=", 1)])
    assert sign_test([1] * 6) < "p = 0.05" < sign_test([1] * 5)
    assert "about 5 images: with fewer than 6 images, no change" in lines(5, keep_best=True)
    weights = "attention=1,accuracy=1", "format=1"
    quiet = [dict(keep_best=True), dict(max_steps=0), *(dict(reward_weights=w) for w in weights)]
    assert not any("\n" in lines(60, **settings) for settings in quiet)
    assert "placebo: the attention reward uses the boxes rolled" in lines(60, region="rolled")
    assert lines(1, max_steps=0).startswith("training: none; held out: 1 question about 1 image: ")
    assert lines(0, max_steps=0) == "training: none; held out: 0 questions about 0 images"

    class Pairs(list):  # two questions about each image, whose changes can cancel out
        rows = [{"image_key": i // 2} for i in range(20)]

    line = module.opening_lines(*[Pairs(range(20))] * 2, Config(keep_best=True))
    assert line.endswith(
        "10 images: changed answers about fewer than 6 images cannot be significant"
    )


def test_exact_sign_test_and_clustered_error():
    assert sign_test([1] * 9 + [-1] + [0] * 5) == "p = 0.021"  # 2 (1 + 10) / 1024
    assert sign_test([]) == sign_test([1, -1]) == "p = 1" and sign_test([1] * 30) == "p < 1e-6"
    # Each on its own image: a standard error of 1 / sqrt(3). Equal values about one image are one.
    error = module.student_t(2) * 3**-0.5
    assert estimate([1.0, 2.0, 3.0, math.nan], range(4)) == pytest.approx((2, error, 3))
    error = module.student_t(1) * 0.5
    assert estimate([1.0, 1.0, 2.0, 2.0], [1, 1, 2, 2]) == pytest.approx((1.5, error, 2))
    assert estimate([1.0, 1.0, 1.0, 2.0], [1, 1, 1, 2])[2] == 4**2 / (3**2 + 1)  # nearly one image
    assert module.paired_change([0.1, 0.3] * 5, [*range(5)] * 2) == ("+0.20", None)
    assert module.paired_change([math.nan], [1]) == ("-", None)
