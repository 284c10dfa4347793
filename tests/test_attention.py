"""attention.py against dense attention, and several groups in one forward pass of the model."""

from types import SimpleNamespace

import pytest
import torch
from conftest import ask, load, trained
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


def dense_weights(group, query, key):
    """Weights (H, S, S) of dense attention with the mask as a loop."""
    P, S = group.P, query.shape[2]
    sees = torch.zeros(S, S, dtype=torch.bool)
    for i in range(S):
        for j in range(i + 1):  # a token sees the prompt and its own completion
            sees[i, j] = j < P or (i - P) // group.C == (j - P) // group.C
    scores = query[0] @ key.repeat_interleave(2, 1)[0].mT * SCALING
    return scores.masked_fill(~sees, -torch.inf).softmax(-1)


def run(groups, capture=None, idx=3):
    packed, qkv = zip(*groups)
    layer = SimpleNamespace(layer_idx=idx, scaling=SCALING, is_causal=True, num_key_value_groups=2)
    q, k, v = (torch.cat(parts, 2) for parts in zip(*qkv))
    return attend(layer, q, k, v, None, packed=packed, capture=capture, scaling=SCALING)[0]


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
            weights = dense_weights(group, *(x.detach().float() for x in qkv[:2]))
            rows = weights[heads, group.P - 1 :][..., IMAGE]  # (heads, 1 + G*C, N)
            torch.testing.assert_close(found, rows.mean(0) if capture is mean else rows)
            assert not found.requires_grad


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


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_packed_groups_equal_single_groups(any_model, checkpointing):
    vlm, towers = load(any_model, gradient_checkpointing=checkpointing), []
    core = vlm.core.model
    tower = core.vision_tower if hasattr(core, "vision_tower") else core.visual
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
        return torch.cat([g.flatten() for g in torch.autograd.grad(total, trained(vlm).values())])

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


def test_sampling_goes_on_until_every_completion_ends(monkeypatch):
    vlm, found = load(), []
    for every in (1, 7):  # tokens between checks
        monkeypatch.setattr(model, "CHECK_DONE", {"cpu": every})
        _, completions = ask(vlm, G=16, C=20, temperature=3.0)
        lengths = completions.mask.sum(1)
        assert len(lengths.unique()) > 1 and (completions.finished | (lengths == 20)).all()
        found.append(completions)
    assert torch.equal(found[0].ids, found[1].ids) and found[0].texts == found[1].texts
