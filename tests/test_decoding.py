"""decoding.py: token by token, the same log-probabilities as one forward pass of transformers."""

from types import SimpleNamespace

import pytest
import torch
from conftest import ask, load
from torch.utils._python_dispatch import TorchDispatchMode

import decoding
from attention import PromptCache, decode_attention
from decoding import GraphDecoder, fast_linear
from model import Completions
from scenes import Scenes


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def decoded_logps(vlm, prompts, completions):
    """Log p of every token (B*G, C), from feeding the completions of B prompts token by token."""
    ids = torch.cat([group.ids for group in completions])
    hidden, caches, start = vlm._prefill(prompts, len(completions[0].ids))  # (B*G, hidden size)
    decoder, logps = vlm._decoder(caches, start, ids.shape[1]), []
    for t in range(ids.shape[1]):
        all_logps = vlm._logits(hidden, 1.0).log_softmax(-1)
        logps.append(all_logps.gather(1, ids[:, t : t + 1]))
        hidden = decoder.step(ids[:, t], t)
    return torch.cat(logps, 1)


def random_completions(vlm, G=3, C=9):
    words = torch.tensor([id for id in range(64) if id not in vlm.placeholders])
    ids = words[torch.randint(len(words), (G, C))]
    return Completions(ids, torch.ones_like(ids).bool())


@pytest.mark.parametrize("load_in_4bit", [False, True], ids=["fp32", "nf4"])
def test_decoding_equals_scoring(any_model, load_in_4bit):
    """Alone, and together with a shorter prompt; with the ordinary step, and with the fixed step of
    a CUDA graph. On a CPU it runs without a graph, but with the same shapes."""
    vlm = load(any_model, load_in_4bit=load_in_4bit)
    prompt, _ = ask(vlm)
    short = vlm.encode(Scenes("validation", 1)[0].image, "dot ?")
    groups = [random_completions(vlm), random_completions(vlm)]
    expected = torch.cat([vlm.score(*pair).logps for pair in zip([prompt, short], groups)])
    for vlm.cuda_graph in (False, True):
        together = decoded_logps(vlm, [prompt, short], groups)
        torch.testing.assert_close(together, expected, atol=5e-5, rtol=0)
        alone = decoded_logps(vlm, [prompt], groups[:1])
        torch.testing.assert_close(alone, expected[:3], atol=5e-5, rtol=0)
    with vlm.model.disable_adapter():
        base = decoded_logps(vlm, [prompt], groups[:1])
    reference = vlm.score(prompt, groups[0], reference=True).logps
    torch.testing.assert_close(base, reference, atol=5e-5, rtol=0)
    assert (base - alone).abs().max() > 1e-3


@pytest.mark.parametrize("dtype, bound", [(torch.bfloat16, 0.2), (torch.float16, 0.02)])
def test_16_bit_decoding_is_close_to_scoring(dtype, bound):
    vlm = load(dtype=dtype)
    prompt, completions = ask(vlm)
    difference = decoded_logps(vlm, [prompt], [completions]) - vlm.score(prompt, completions).logps
    assert 0 < difference[completions.mask].abs().max() < bound


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_large_bias_of_the_keys_does_not_matter(dtype):
    """It adds 200 to all scores, of which 16 bits would keep no fraction."""
    generator, D = torch.Generator().manual_seed(0), 128
    query, keys, values = torch.randn(3, 1, 2, 4, 30, D, generator=generator)  # B, H_kv, G, h or t
    query[..., 0], keys[..., 0] = 50, 200 * D**0.5 / 50
    query, keys, values = (x.to(dtype) for x in (query, keys, values))
    prompt = PromptCache(keys[:, :, 0], values[:, :, 0], None)
    found = decode_attention(query, keys, values, prompt, D**-0.5)
    both = [
        torch.cat([p[:, :, None].expand_as(x), x], 3).double()
        for p, x in ((prompt.keys, keys), (prompt.values, values))
    ]
    expected = torch.nn.functional.scaled_dot_product_attention(query.double(), *both)
    assert (found - expected).norm() < 0.01 * expected.norm()


class Operations(TorchDispatchMode):
    """Adds the name of every operation and the shape of its result to `seen`."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **kwargs or {})
        self.seen.append((str(function), getattr(out, "shape", None)))
        return out


@pytest.mark.parametrize("graph", [False, True])
def test_buffers_have_their_final_length_and_a_graph_can_replay_a_step(graph):
    """A cache that is concatenated would be copied at every token. A CUDA graph repeats the same
    operations at the same addresses, and nothing in it may wait for the GPU, as `item` does."""
    vlm, steps, addresses = load(), [], []
    vlm.cuda_graph = graph
    _, caches, start = vlm._prefill([ask(vlm)[0]], 4)
    decoder = vlm._decoder(caches, start, 20)
    assert isinstance(decoder, GraphDecoder) == graph and decoder.layers[0].keys.shape[3] == 20
    for t in range(3):
        with Operations() as operations:
            operations.seen = []
            decoder.step(torch.full((4,), 7), t)
        steps.append(operations.seen)
        tensors = [x for layer in decoder.layers for x in (layer.keys, layer.values)]
        tensors += [decoder.token, decoder.t, decoder.cos] if graph else []
        addresses.append([x.data_ptr() for x in tensors])
    assert addresses[0] == addresses[1] == addresses[2]
    assert (steps[0] == steps[1] == steps[2]) == graph
    assert not any("_local_scalar_dense" in name for name, _ in steps[0])


def test_weights_that_are_dequantized_once_change_no_bit(monkeypatch):
    """They are held only while sampling, and only if there is room."""
    vlm = load(load_in_4bit=True)
    layer = vlm.core.model.language_model.layers[0].mlp.gate_proj.base_layer
    x, full = torch.randn(5, layer.in_features), torch.nn.Linear(3, 3)
    held = fast_linear(layer, torch.float32, True)
    assert held is not layer and torch.equal(held(x), layer(x))
    assert fast_linear(full, torch.float32, True) is full
    needed = 4 * decoding.quantized_numel(vlm.core)  # bytes
    assert needed == 4 * 4 * sum(
        p.quant_state.shape.numel()
        for p in vlm.core.model.language_model.layers[0].parameters()
        if hasattr(p, "quant_state")
    )
    for free, expected in ((2 * needed, True), (2 * needed - 1, False)):
        memory = SimpleNamespace(available=free)
        monkeypatch.setattr(decoding, "virtual_memory", lambda memory=memory: memory)
        assert decoding.room_for_weights(vlm.core, torch.float32) == expected
