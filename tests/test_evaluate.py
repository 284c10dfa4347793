"""analysis/evaluate.py: the results of an evaluation, the maps of every layer and head, and their
form in the report."""

from dataclasses import replace

import pytest
import torch
from conftest import ask, load

import reward
from analysis.evaluate import attention_maps, evaluate, report_maps, trace_attention
from analysis.html_report import pack_map
from config import TINY as PRESET
from config import Config
from data import region_mask
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
    trace = trace_attention(vlm, prompt, CFG)
    page = report_maps(vlm, prompt, trace, CFG)
    assert page["layers"] == [0, 1, 2, 3] and page["grid"] == (7, 7)
    assert len(page["words"]) == len(trace.entropy)
    largest, cells = pack_map(trace.attention[5].tolist())
    # The last layer is the one that the reward uses.
    assert page["maps"][3][5] == [pytest.approx(largest, abs=2e-5), cells]


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
