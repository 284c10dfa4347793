"""attention.py against dense attention, and several groups in one forward pass of the model."""

from types import SimpleNamespace

import pytest
import torch
from conftest import TINY, ask, load, trained
from torch.utils._python_dispatch import TorchDispatchMode

import model
from attention import Capture, PackedGroup, image_attention
from attention import sayo_attention as attend
from scenes import Scenes

SCALING, IMAGE = 0.3, torch.tensor([1, 2, 4])  # positions of the image tokens in the prompt


def make_group(P, G, C):
    """A PackedGroup with random (query, key, value), 4 query heads and 2 key heads of size 8."""
    generator = torch.Generator().manual_seed(P)
    qkv = [torch.randn(1, heads, P + G * C, 8, generator=generator) for heads in (4, 2, 2)]
    mask = torch.ones(1, 1, C, P + C, dtype=torch.bool).tril(P)
    return PackedGroup(P, G, C, IMAGE, mask), qkv


def dense(group, query, key, value):
    """Weights (H, S, S) and output (1, S, H, D) of dense attention with the mask as a loop."""
    P, S = group.P, query.shape[2]
    sees = torch.zeros(S, S, dtype=torch.bool)
    for i in range(S):
        for j in range(i + 1):  # a token sees the prompt and its own completion
            sees[i, j] = j < P or (i - P) // group.C == (j - P) // group.C
    key, value = (x.repeat_interleave(2, 1)[0] for x in (key, value))
    weights = (query[0] @ key.mT * SCALING).masked_fill(~sees, -torch.inf).softmax(-1)
    return weights, (weights @ value).transpose(0, 1)[None]


def run(groups, capture=None, idx=3):
    packed, qkv = zip(*groups)
    layer = SimpleNamespace(layer_idx=idx, scaling=SCALING, is_causal=True, num_key_value_groups=2)
    q, k, v = (torch.cat(parts, 2) for parts in zip(*qkv))
    return attend(layer, q, k, v, None, packed=packed, capture=capture, scaling=SCALING)[0]


def test_every_completion_sees_its_prompt_and_its_own_past():
    groups = [make_group(7, 3, 4), make_group(5, 2, 6), make_group(6, 0, 0)]
    expected = torch.cat([dense(group, *qkv)[1] for group, qkv in groups], 1)
    torch.testing.assert_close(run(groups), expected)


@pytest.mark.parametrize("floats", [2**25, 1])
@pytest.mark.parametrize("heads", [[0], [1, 3], [0, 1, 2, 3]])
def test_captured_attention_is_that_of_the_image_tokens_in_fp32(heads, floats, monkeypatch):
    monkeypatch.setattr("attention.MAP_FLOATS", floats)  # all heads at once, or one by one
    groups = [make_group(7, 3, 4), make_group(5, 2, 6)]
    groups = [(group, [x.bfloat16().requires_grad_() for x in qkv]) for group, qkv in groups]
    mean, each = Capture([1, 3], heads), Capture([1, 3], heads, average_heads=False)
    for capture in (mean, each):
        run(groups, capture)
        run(groups, capture, idx=2)
        assert list(capture.maps) == [3]  # of the layers that were asked for
        maps, capture.maps = capture.maps[3], {3: "kept"}
        run(groups, capture)  # gradient checkpointing runs a layer twice
        assert capture.maps == {3: "kept"}
        for (group, qkv), found in zip(groups, maps):
            rows = dense(group, *(x.detach().float() for x in qkv))[0][heads, group.P - 1 :]
            rows = rows[..., IMAGE]  # (heads, 1 + G*C, N)
            torch.testing.assert_close(found, rows.mean(0) if capture is mean else rows)
            assert not found.requires_grad


def test_a_plain_sequence_is_computed_by_transformers():
    group, (query, key, value) = make_group(7, 0, 0)
    layer = SimpleNamespace(is_causal=True, num_key_value_groups=2)
    out, weights = attend(layer, query, key, value, None, scaling=SCALING, capture=None)
    assert weights is None
    torch.testing.assert_close(out, dense(group, query, key, value)[1])


class LargestTensor(TorchDispatchMode):
    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.numel = max(self.numel, out.untyped_storage().nbytes() // out.element_size())
        return out


def test_memory_does_not_grow_with_the_square_of_the_packed_length():
    P, G, C = 100, 20, 100  # 2,100 tokens; their square is 4.4 million
    group = make_group(P, G, C)
    with LargestTensor() as largest:
        image_attention(*group[1][:2], group[0], Capture([0], [0, 1]), SCALING)
    assert largest.numel == 2 * (1 + G * C) * (P + C)
    with LargestTensor() as largest, torch.no_grad():
        run([group])
    assert largest.numel <= G * 4 * (P + C) * 8  # G copies of the keys, for every query head


# --- several groups in one forward pass of the model


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("family", ["qwen3", "qwen2_5", "internvl"])
def test_packed_groups_equal_single_groups(family, checkpointing, request):
    folder = TINY if family == "qwen3" else request.getfixturevalue(family)
    vlm, towers = load(folder, gradient_checkpointing=checkpointing), []
    tower = getattr(vlm.core.model, "vision_tower" if family == "internvl" else "visual")
    tower.register_forward_hook(lambda *_: towers.append(1))
    image = Scenes("validation", 3)[2].image.resize((64, 96))
    prompts = [ask(vlm, 0, C=1)[0], vlm.encode(image, "dot ?")]
    towers.clear()
    for prompt in prompts:
        prompt.features = None
    generator = torch.Generator().manual_seed(0)
    groups = vlm.sample_groups(prompts, 3, 12, generator=generator)
    groups[1] = groups[1][:2]

    def gradient(scores):
        total = sum((s.logps * c.mask).sum() for s, c in zip(scores, groups))
        return torch.cat([g.flatten() for g in torch.autograd.grad(total, trained(vlm))])

    packed = vlm.score_groups(prompts, groups)
    alone = [vlm.score(*pair) for pair in zip(prompts, groups)]
    assert len(towers) == 1  # for all images at once, and never again
    for found, expected, group in zip(packed, alone, groups):
        for name in ("logps", "entropy", "attention"):
            a, b = (getattr(scores, name)[group.mask] for scores in (found, expected))
            torch.testing.assert_close(a, b, atol=2e-5, rtol=0)
        torch.testing.assert_close(found.prompt_attention, expected.prompt_attention)
    torch.testing.assert_close(gradient(packed), gradient(alone), atol=1e-4, rtol=1e-4)
    groups[1].temperature = 0.5
    with pytest.raises(ValueError):  # one temperature for all
        vlm.score_groups(prompts, groups)


def test_batches_have_at_most_the_limit_or_one_item():
    for batches in ([], [[5000]], [[4000, 96], [1]], [[5000], [1], [5000]]):
        lengths = iter(sum(batches, []))
        assert list(model.split_by_tokens(lengths, lambda length: length)) == batches


def test_sampling_goes_on_until_every_completion_ends(monkeypatch):
    vlm, found = load(), []
    for every in (1, 7):  # tokens between checks
        monkeypatch.setattr(model, "CHECK_DONE", {"cpu": every})
        _, completions = ask(vlm, G=16, C=20, temperature=3.0)
        lengths = completions.mask.sum(1)
        assert len(lengths.unique()) > 1 and (completions.finished | (lengths == 20)).all()
        found.append(completions)
    assert torch.equal(found[0].ids, found[1].ids) and found[0].texts == found[1].texts
