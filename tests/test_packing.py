"""Several groups in one forward give the same scores, gradients and runs as one at a time."""

import json

import pytest
import torch
from conftest import TINY, ask, load

import model
import sayo_mini
from config import Config
from model import Completions
from sources.packing import split_by_tokens
from sources.scenes import Scenes

FAST = "--device cpu --prompts_per_step 3 --num_generations 4 --max_steps 1"
FAST = [*FAST.split(), "--eval_examples", "2", "--model_name_or_path", str(TINY)]


@pytest.fixture(params=["qwen3", "qwen2_5"])
def folder(request):
    return TINY if request.param == "qwen3" else request.getfixturevalue("qwen2_5")


def make_groups(vlm):
    """Three groups with different questions, image sizes, G and C."""
    groups = [ask(vlm, 0, G=4, C=12), ask(vlm, 1, G=2, C=5)]
    image = Scenes("validation", 3)[2].image.resize((64, 96))
    prompt = vlm.encode(image, "dot ?")
    groups.append((prompt, vlm.sample(prompt, 3, 7, 1.0, torch.Generator().manual_seed(0))))
    return [list(each) for each in zip(*groups)]


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_packed_groups_score_like_single_groups(folder, checkpointing):
    vlm = load(folder, gradient_checkpointing=checkpointing)
    prompts, completions = make_groups(vlm)
    assert len({len(p.input_ids) for p in prompts}) > 1
    packed = vlm.score_groups(prompts, completions)
    for prompt, c, found in zip(prompts, completions, packed):
        alone = vlm.score(prompt, c)
        for name in ("logps", "entropy"):
            a, b = (getattr(scores, name)[c.mask] for scores in (found, alone))
            torch.testing.assert_close(a, b, atol=2e-5, rtol=0)
        torch.testing.assert_close(found.attention, alone.attention, atol=1e-5, rtol=0)
        torch.testing.assert_close(found.prompt_attention, alone.prompt_attention)


def test_packed_groups_have_the_gradient_of_single_groups():
    vlm = load()
    prompts, completions = make_groups(vlm)
    parameters = [p for p in vlm.model.parameters() if p.requires_grad]

    def gradient(scores):
        total = sum((s.logps * c.mask).sum() for s, c in zip(scores, completions))
        return torch.cat([g.flatten() for g in torch.autograd.grad(total, parameters)])

    packed = gradient(vlm.score_groups(prompts, completions))
    alone = gradient([vlm.score(*pair) for pair in zip(prompts, completions)])
    torch.testing.assert_close(packed, alone, atol=1e-4, rtol=1e-4)
    assert packed.abs().max() > 1e-2


def test_groups_of_different_temperatures_are_refused():
    vlm = load()
    prompts, completions = make_groups(vlm)
    completions[1].temperature = 0.5
    with pytest.raises(ValueError):
        vlm.score_groups(prompts, completions)


def test_a_group_does_not_see_the_other_groups():
    vlm = load()
    prompts, completions = make_groups(vlm)
    with torch.no_grad():
        first = vlm.score_groups(prompts, completions)
        other = completions[1].ids.clone().fill_(20)
        completions[1] = Completions(other, torch.ones_like(other).bool())
        second = vlm.score_groups(prompts, completions)
    assert torch.equal(first[0].entropy, second[0].entropy)
    assert torch.equal(first[2].entropy, second[2].entropy)
    assert not torch.equal(first[1].entropy, second[1].entropy)


def test_the_vision_tower_runs_once_for_all_images(folder):
    vlm, calls = load(folder), []
    vlm.core.model.visual.register_forward_hook(lambda *_: calls.append(1))
    scenes = Scenes("validation", 5)
    prompts = [vlm.encode(scenes[i].image, scenes[i].question) for i in range(5)]
    vlm.sample_groups(prompts, 2, 3, temperature=0)
    vlm.sample_groups(prompts[:2], 2, 3, temperature=0)
    assert len(calls) == 1


@pytest.mark.parametrize("per_forward, forwards", [(0, [1, 1, 1]), (9, [2, 1]), (64, [3])])
def test_completions_per_forward_above_g_packs_groups(tmp_path, monkeypatch, per_forward, forwards):
    sizes, original = [], sayo_mini.score_and_reward

    def score_and_reward(vlm, rollouts, cfg):
        sizes.append(len(rollouts))
        return original(vlm, rollouts, cfg)

    monkeypatch.setattr(sayo_mini, "score_and_reward", score_and_reward)
    flags = [*FAST, "--completions_per_forward", str(per_forward)]
    assert sayo_mini.main([*flags, "--output_dir", str(tmp_path / "run")]) == 0
    assert sizes == forwards
    packed = read_metrics(tmp_path / "run")
    flags = [*FAST, "--completions_per_forward", "2"]  # every group is split
    assert sayo_mini.main([*flags, "--output_dir", str(tmp_path / "split")]) == 0
    for ours, theirs in zip(packed, read_metrics(tmp_path / "split")):
        for name in ("loss", "grad_norm", "kl", "entropy", "reward"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-5), name


def read_metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    "lengths, batches",
    [
        ([], []),
        ([4], [[4]]),
        ([5000], [[5000]]),
        ([4000, 96, 1], [[4000, 96], [1]]),
        ([5000, 1, 5000], [[5000], [1], [5000]]),
    ],
)
def test_batches_have_at_most_the_limit_or_one_item(lengths, batches):
    assert list(split_by_tokens(iter(lengths), lambda length: length)) == batches


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_checking_rarely_whether_all_are_done_changes_nothing(monkeypatch, temperature):
    vlm, found = load(), []
    for every in (1, 7):
        monkeypatch.setattr(model, "CHECK_DONE", {"cpu": every})
        _, completions = ask(vlm, G=4, C=20, temperature=temperature)
        found.append(completions)
    assert torch.equal(found[0].ids, found[1].ids) and torch.equal(found[0].mask, found[1].mask)
    assert found[0].texts == found[1].texts


def test_a_packed_group_of_equal_rewards_is_left_out():
    """The first of two groups is skipped, so the gradient is that of the second alone."""
    vlm = load()
    cfg = Config(num_generations=4, completions_per_forward=8, beta=0.0, format_lengths="1,20")
    scenes = Scenes("validation", 2)
    rollouts = [(scenes[i], *ask(vlm, i)) for i in range(2)]
    gradients = []
    for chosen in (rollouts, rollouts[1:]):
        groups, scores = sayo_mini.score_and_reward(vlm, chosen, cfg)
        groups[0].zero_std = len(groups) == 2
        assert not groups[-1].zero_std
        scaler = sayo_mini.NO_LOSS_SCALE
        losses = sayo_mini.accumulate_gradient(vlm, groups, cfg, 100, scaler, scores)
        assert len(losses) == 1
        parameters = [p for p in vlm.model.parameters() if p.requires_grad]
        gradients.append(torch.cat([p.grad.flatten() for p in parameters]))
        vlm.model.zero_grad()
    assert gradients[1].abs().max() > 1e-3
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-3)


def test_sampling_goes_on_until_every_completion_ends():
    vlm = load()
    _, completions = ask(vlm, G=16, C=20, temperature=3.0)
    lengths = completions.mask.sum(1)
    assert len(set(lengths.tolist())) > 1
    assert (completions.finished | (lengths == 20)).all()
