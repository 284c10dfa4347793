"""analysis/evaluate.py: the results of an evaluation, the maps of every layer and head, and their
form in the report."""

from dataclasses import replace

import pytest
import torch
from conftest import ask, load

import reward
from analysis import page_maps
from analysis.evaluate import are_results, attention_maps, evaluate, report_maps, trace_attention
from analysis.html_report import pack_map, unpack_map
from config import TINY as PRESET
from config import Config
from data import example_region, region_mask
from model import Completions
from sources.scenes import Scenes

CFG = Config(**PRESET)


@pytest.mark.parametrize("layers, heads", [((-1,), None), ((0, 2), (1, 3))])
def test_score_averages_the_maps_of_its_layers_and_heads(layers, heads):
    vlm = load(layers=layers, heads=heads)
    prompt, completions = ask(vlm, G=2)
    maps, prompt_maps = attention_maps(vlm, prompt, completions)
    G, C = completions.ids.shape
    assert maps.shape == (4, 4, G, C, 49) and prompt_maps.shape == (4, 4, 49)
    with torch.no_grad():
        scores = vlm.score(prompt, completions)
    mean, prompt_mean = (m[vlm.layers][:, vlm.heads].mean((0, 1)) for m in (maps, prompt_maps))
    assert torch.allclose(mean, scores.attention, atol=1e-6)
    assert torch.allclose(prompt_mean, scores.prompt_attention, atol=1e-6)


def test_report_gets_the_captured_attention():
    vlm, example = load(), Scenes("validation", 1)[0]
    prompt = vlm.encode(example.image, example.question)
    trace, region = trace_attention(vlm, prompt, CFG), example_region(example, (7, 7))
    page = report_maps(vlm, prompt, region, trace, CFG)
    assert page["layers"] == [0, 1, 2, 3] and page["grid"] == (7, 7)
    assert len(page["words"]) == len(trace.entropy)
    # The last layer is the one that the reward uses.
    for maps in (page["maps"][3], page["rewarded"]["maps"]):
        largest, cells = pack_map(trace.attention[5].tolist())
        assert maps[5] == [pytest.approx(largest, abs=2e-5), cells]

    heads = page["heads"]
    assert heads["count"] == [4, 4] and sorted(heads["kept"]) == list(range(16))
    vlm = load(layers=(2,), heads=(1,))
    trace = trace_attention(vlm, prompt, CFG, trace.completion)
    scores = reward.localization(trace.attention[trace.selected].mean(0), region)
    assert heads["auroc"][2 * 4 + 1] == pytest.approx(scores["auroc"], abs=2e-3)
    packed, start = heads["maps"][5], 50 * heads["kept"].index(2 * 4 + 1)
    (largest,) = unpack_map([packed[0], packed[1][start]])
    shown = torch.tensor(unpack_map([largest, packed[1][start + 1 : start + 50]]))
    assert largest == pytest.approx(trace.attention[5].max().item(), rel=0.15)
    shape = shown / shown.max(), trace.attention[5] / trace.attention[5].max()
    assert torch.allclose(*shape, atol=0.02)


def test_large_models_keep_the_heads_that_find_the_region_best():
    """Head 40 of 28 x 16 looks only at the region, head 41 nowhere near it."""
    grid, tokens = (16, 16), 111
    attention = torch.rand(28, 16, tokens, 256, generator=torch.Generator().manual_seed(0)) / 256
    region = torch.arange(256) < 32
    attention[2, 8], attention[2, 9] = region.float(), (~region).float()
    selected = torch.arange(tokens) % 3 == 0
    heads = page_maps.head_fields(attention, selected, region, grid)
    kept = heads["kept"]
    assert heads["grid"] == (4, 4) and kept[0] == 40 and 41 not in kept
    assert 10 < len(kept) < 30 and heads["auroc"][40] == 1 and heads["auroc"][41] == 0
    assert min(heads["auroc"][k] for k in kept) >= max(
        a for k, a in enumerate(heads["auroc"]) if k not in kept
    )
    assert len(heads["mean"][1]) == 448 * 17
    assert all(len(text) == len(kept) * 17 for _, text in heads["maps"])
    top = torch.zeros(4, 4)
    top[0] = 0.5  # the region is two of the four rows of tokens in these cells
    start = 17 * 40
    assert heads["mean"][1][start + 1 : start + 17] == pack_map(top.flatten().tolist())[1]


def test_head_aurocs_are_those_of_localization():
    maps = torch.rand(40, 12, generator=torch.Generator().manual_seed(0)).round(decimals=1)  # ties
    region = torch.arange(12) % 5 == 0
    expected = [reward.localization(m, region)["auroc"] for m in maps]
    assert page_maps.head_aurocs(maps, region).tolist() == pytest.approx(expected)
    whole = page_maps.head_fields(maps.view(2, 2, 10, 12), torch.ones(10) > 0, region >= 0, (3, 4))
    assert whole["auroc"] is None and sorted(whole["kept"]) == [0, 1, 2, 3]


def test_long_answers_get_coarser_maps_and_fewer_layers():
    attention = torch.rand(28, 2000, 256)
    rewarded, layers = (
        page_maps.reward_fields(attention[0], (16, 16)),
        page_maps.layer_fields(attention, (16, 16)),
    )
    for fields, maps, most in (
        (rewarded, rewarded["maps"], page_maps.REWARD_CHARACTERS),
        (layers, sum(layers["maps"], []), page_maps.LAYER_CHARACTERS),
    ):
        assert len(maps) == 2000 and sum(len(cells) for _, cells in maps) <= most
        assert fields["grid"] == (2, 2) or fields["grid"] == (3, 3)
    assert layers["layers"] == [27]


def test_pooling_keeps_the_mean():
    attention = torch.rand(3, 5, 16 * 12)
    pooled, grid = page_maps.pool(attention, (16, 12), 4)
    assert grid == (4, 4) and pooled.shape == (3, 5, 16)
    assert torch.allclose(pooled.mean(-1), attention.mean(-1))
    same, grid = page_maps.pool(attention, (16, 12), 16)
    assert grid == (16, 12) and torch.equal(same, attention)


def test_damaged_results_are_recognized():
    rows = evaluate(load(), Scenes("validation", 2), CFG, "before")
    assert are_results(rows, 2)
    assert rows[0]["question"] == Scenes("validation", 2)[0].question
    old = {"question", "answer", "early", "late", "permuted_early", "permuted_late", "small_map"}
    assert are_results([{k: v for k, v in row.items() if k not in old} for row in rows], 2)
    largest, cells = rows[0]["small_map"]
    for change in (
        {"small_map": [largest, cells[:-1]]},
        {"small_map": [largest, "!" + cells[1:]]},
        {"small_map": ["1", cells]},
        {"small_map": [float("nan"), cells]},
        {"small_map": cells},
        {"small_map": None},
        {"question": 1},
        {"answer": None},
        {"early": "1"},
        {"late": float("nan")},
        {"correct": float("inf")},
        {"image_mass": -float("inf")},
    ):
        assert not are_results([rows[0] | change, rows[1]], 2), change
    assert not are_results([{k: v for k, v in rows[0].items() if k != "permuted_late"}], 1)


def test_batch_size_does_not_change_the_results(monkeypatch):
    """Compare batches of two, in which the fifth question is alone, with a single batch of five."""
    scenes, vlm, runs = Scenes("validation", 5), load(), []
    for tokens in (200, 4096):
        monkeypatch.setattr("sources.packing.TOKENS_PER_FORWARD", tokens)
        before = evaluate(vlm, scenes, CFG, "before")
        with vlm.model.disable_adapter():
            after = evaluate(vlm, scenes, CFG, "after", before)
        names = ("id", "text", "ids", "auroc")
        runs.append([(*(x[n] for n in names), y["fixed_auroc"]) for x, y in zip(before, after)])
    in_twos, at_once = runs
    for row, expected in zip(in_twos, at_once):
        assert row[:3] == expected[:3] and row[3:] == pytest.approx(expected[3:], abs=1e-4)
    assert [row[0] for row in in_twos] == [scenes[i].id for i in range(5)]
    assert len({row[1] for row in in_twos}) > 2


def test_maps_are_scored_against_the_next_box_and_on_fixed_text():
    """The next example's box is scored on the same map; the fixed text is the earlier answer."""
    cfg, scenes, vlm = replace(CFG, alignment="query"), Scenes("validation", 3), load()
    # An earlier evaluation by a different model, which uses one head and stops after nine tokens.
    before = evaluate(load(heads=(0,)), scenes, cfg, "before")
    for row in before:
        row["ids"], row["selected"] = row["ids"][:9], [True] * 9
    after = evaluate(vlm, scenes, cfg, "after", before)
    for i, row in enumerate(after):
        prompt = vlm.encode(scenes[i].image, scenes[i].question)
        boxes, next_boxes = (scenes[j % 3].boxes for j in (i, i + 1))
        region, next_region = (region_mask(b, (112, 112), (7, 7)) for b in (boxes, next_boxes))
        attention = torch.tensor(row["map"])
        assert row["auroc"] == reward.localization(attention, region)["auroc"]
        assert row["permuted_auroc"] == reward.localization(attention, next_region)["auroc"]
        trace = trace_attention(vlm, prompt, cfg)
        for prefix, box in (("", region), ("permuted_", next_region)):
            looks = reward.early_and_late(trace.attention, box, trace.selected)
            assert [row[f"{prefix}early"], row[f"{prefix}late"]] == looks
        ids = torch.tensor([before[i]["ids"]])
        with torch.no_grad():
            scores = vlm.score(prompt, Completions(ids, torch.ones_like(ids).bool()))
        fixed = reward.localization(scores.attention[0].mean(0), region)["mass_over_area"]
        assert row["fixed_mass_over_area"] == pytest.approx(fixed)
        assert row["fixed_mass_over_area"] != pytest.approx(row["mass_over_area"])
