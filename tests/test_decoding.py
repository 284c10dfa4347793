"""`sources.decoding` gives the same tokens as transformers, with a fraction of the operations."""

import pytest
import torch
from conftest import TINY, ask, load
from torch.utils._python_dispatch import TorchDispatchMode

from attention import PromptCache
from model import Completions
from sources.decoding import Decoder, GraphDecoder, fast_linear
from sources.scenes import Scenes


@pytest.fixture(params=["qwen3", "qwen2_5"])
def folder(request):
    return TINY if request.param == "qwen3" else request.getfixturevalue("qwen2_5")


def decoded_logps(vlm, prompts, completions):
    """Log p of every token, from feeding the completions of B prompts token by token. The prompts
    are processed by transformers, the completions by `Decoder`. Returns: (B*G, C)."""
    G, ids = len(completions[0].ids), torch.cat([c.ids for c in completions])
    hidden, caches, start = vlm._prefill(prompts, G)  # hidden (B*G, hidden size)
    decoder, logps = vlm._decoder(caches, start, ids.shape[1]), []
    for t in range(ids.shape[1]):
        all_logps = vlm._logits(hidden, 1.0).log_softmax(-1)
        logps.append(all_logps.gather(1, ids[:, t : t + 1]))
        hidden = decoder.step(ids[:, t], t)
    return torch.cat(logps, 1)


def random_completions(vlm, G=3, C=9):
    words = [id for id in range(64) if id not in vlm.placeholders]
    ids = torch.tensor(words)[torch.randint(len(words), (G, C))]
    return Completions(ids, torch.ones_like(ids).bool(), [""] * G)


@pytest.mark.parametrize("load_in_4bit", [False, True], ids=["fp32", "nf4"])
@torch.no_grad()
def test_decoding_equals_scoring(folder, load_in_4bit):
    """Scoring runs transformers' layers with PEFT's wrappers."""
    vlm = load(folder, load_in_4bit=load_in_4bit)
    prompt, completions = ask(vlm)[0], random_completions(vlm)
    decoded = decoded_logps(vlm, [prompt], [completions])
    torch.testing.assert_close(decoded, vlm.score(prompt, completions).logps, atol=2e-5, rtol=0)


@torch.no_grad()
def test_prompts_of_different_lengths_are_decoded_together(folder):
    vlm = load(folder)
    completions = random_completions(vlm)
    prompts = [ask(vlm)[0], vlm.encode(Scenes("validation", 1)[0].image, "dot ?")]
    assert len(prompts[0].input_ids) != len(prompts[1].input_ids)
    decoded = decoded_logps(vlm, prompts, [completions] * 2).split(len(completions.ids))
    for prompt, logps in zip(prompts, decoded):
        scored = vlm.score(prompt, completions).logps
        torch.testing.assert_close(logps, scored, atol=2e-5, rtol=0)


@torch.no_grad()
def test_a_disabled_adapter_is_not_used_in_decoding():
    vlm = load()
    completions = random_completions(vlm)
    prompt = ask(vlm)[0]
    reference = vlm.score(prompt, completions, reference=True).logps
    with vlm.model.disable_adapter():
        decoded = decoded_logps(vlm, [prompt], [completions])
    torch.testing.assert_close(decoded, reference, atol=2e-5, rtol=0)
    assert (decoded - decoded_logps(vlm, [prompt], [completions])).abs().max() > 1e-3


@torch.no_grad()
def test_an_update_of_the_adapter_is_used_in_the_next_decoding():
    vlm = load()
    completions = random_completions(vlm)
    prompt = ask(vlm)[0]
    before = decoded_logps(vlm, [prompt], [completions])
    for name, p in vlm.model.named_parameters():
        if "lora_A" in name:
            p.mul_(2)
    after = decoded_logps(vlm, [prompt], [completions])
    assert (after - before).abs().max() > 1e-3
    torch.testing.assert_close(after, vlm.score(prompt, completions).logps, atol=2e-5, rtol=0)


@pytest.mark.parametrize("dtype, bound", [(torch.bfloat16, 0.2), (torch.float16, 0.02)])
@torch.no_grad()
def test_16_bit_decoding_is_close_to_scoring(dtype, bound):
    """bench/precision.py publishes the difference."""
    vlm = load(dtype=dtype)
    prompt, completions = ask(vlm)
    decoded = decoded_logps(vlm, [prompt], [completions])
    difference = (decoded - vlm.score(prompt, completions).logps)[completions.mask].abs()
    assert 0 < difference.max() < bound


@torch.no_grad()
def test_buffers_have_their_final_length_from_the_start():
    """A cache that is concatenated at every token would be copied every time."""
    vlm = load()
    prompt = ask(vlm)[0]
    _, caches, start = vlm._prefill([prompt], 4)
    decoder = vlm._decoder(caches, start, 20)
    before = [layer.keys.data_ptr() for layer in decoder.layers]
    for t in range(20):
        decoder.step(torch.full((4,), 7), t)
    assert [layer.keys.data_ptr() for layer in decoder.layers] == before
    assert decoder.layers[0].keys.shape[3] == 20
    assert isinstance(decoder, Decoder) and isinstance(caches[0], PromptCache)


@pytest.mark.parametrize("prompts", [1, 2])
@torch.no_grad()
def test_the_fixed_step_of_a_cuda_graph_equals_the_ordinary_step(folder, prompts):
    """On a CPU the step runs without a graph, but with the same fixed shapes."""
    vlm = load(folder, load_in_4bit=True)
    completions = random_completions(vlm)
    asked = [ask(vlm)[0], vlm.encode(Scenes("validation", 1)[0].image, "dot ?")][:prompts]
    ordinary = decoded_logps(vlm, asked, [completions] * prompts)
    vlm.cuda_graph = True
    fixed = decoded_logps(vlm, asked, [completions] * prompts)
    torch.testing.assert_close(fixed, ordinary, atol=1e-5, rtol=0)


@torch.no_grad()
def test_a_cuda_graph_samples_the_same_completions():
    vlm, samples = load(), []
    prompt = ask(vlm)[0]
    for vlm.cuda_graph in (False, True):
        generator = torch.Generator().manual_seed(0)
        samples.append(vlm.sample(prompt, 8, 20, 1.0, generator))
    assert torch.equal(samples[0].ids, samples[1].ids)


@torch.no_grad()
def test_no_shape_and_no_address_changes_between_the_steps_of_a_cuda_graph():
    """A graph replays the recorded operations on the recorded addresses."""
    vlm, shapes = load(), []
    _, caches, start = vlm._prefill([ask(vlm)[0]], 4)
    decoder = GraphDecoder(vlm.core, caches, start, 20)
    inputs = [decoder.token, decoder.t, decoder.cos, decoder.layers[0].keys]
    addresses = [tensor.data_ptr() for tensor in inputs]

    class Shapes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **kwargs or {})
            shapes[-1].append((str(function), getattr(out, "shape", None)))
            return out

    for t in range(3):
        shapes.append([])
        with Shapes():
            decoder.step(torch.full((4,), 7), t)
    assert shapes[0] == shapes[1] == shapes[2] and len(shapes[0]) > 100
    assert not any("_local_scalar_dense" in name for name, _ in shapes[0])  # waits for the GPU
    assert [tensor.data_ptr() for tensor in inputs] == addresses


@torch.no_grad()
def test_scales_that_are_dequantized_once_change_no_bit():
    vlm = load(load_in_4bit=True)
    layer = vlm.core.model.language_model.layers[0].mlp.gate_proj.base_layer
    x = torch.randn(5, layer.in_features)
    assert fast_linear(layer) is not layer and torch.equal(fast_linear(layer)(x), layer(x))
    full_precision = load().core.model.language_model.layers[0].mlp.gate_proj.base_layer
    assert fast_linear(full_precision) is full_precision
