"""Tests of model.py and attention.py against independent implementations: the transformers forward
on one completion at a time, and eager attention."""

from contextlib import nullcontext

import bitsandbytes
import pytest
import torch
from conftest import TINY, ask, load, trained
from PIL import Image

import model
from config import InputError
from model import Completions, load_vlm
from scenes import Scenes

LENGTHS = torch.tensor([[12], [7], [1], [10]])  # of four completions; unequal, so there is padding


def reference_forward(vlm, prompt, completions, row, **kwargs):
    """Run the transformers forward on one unpadded [image, prompt, completion]; transformers also
    computes the positions and vision features. Returns: the logits (C_i, V) that predict each token
    of the completion, and the whole output."""
    ids = torch.cat([prompt.input_ids, completions.ids[row][completions.mask[row]]])[None]
    layout = {}
    if len(prompt.position_ids) == 3:  # M-RoPE
        layout["mm_token_type_ids"] = kinds = torch.zeros_like(ids)
        kinds[0, prompt.image_positions] = 1
        vlm.core.model.rope_deltas = None
    out = vlm.core(input_ids=ids, **layout, **prompt.image, use_cache=False, **kwargs)
    return out.logits[0, len(prompt.input_ids) - 1 : -1].float(), out


def reference_scores(vlm, prompt, completions, row):
    """log p and entropy (C_i,) of one completion, computed with `reference_forward`."""
    logits, _ = reference_forward(vlm, prompt, completions, row)
    logits = logits / completions.temperature
    logits[:, vlm.placeholders] = -torch.inf
    logps = logits.log_softmax(-1)
    entropy = -(logps.exp() * logps.clamp(min=-1e9)).sum(-1)
    ids = completions.ids[row][completions.mask[row]]
    return logps.gather(1, ids[:, None])[:, 0], entropy


def pop_gradients(vlm):
    grads = {name: p.grad.clone() for name, p in trained(vlm).items()}
    vlm.model.zero_grad()
    return grads


# --- scoring ---


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("split", [0, 3, 1])
def test_packed_group_equals_separate_forwards(any_model, checkpointing, split):
    """The shared prompt, padding, M-RoPE positions and chunked projection do not change
    log-probabilities, entropies or gradients."""
    vlm = load(any_model, gradient_checkpointing=checkpointing, completions_per_forward=split)
    prompt, completions = ask(vlm, temperature=1.3)
    completions.ids[0, 3] = vlm.pad_id  # written by the model: real tokens are known by position
    completions.mask = torch.arange(completions.ids.shape[1]) < LENGTHS
    weight = torch.randn(completions.ids.shape, generator=torch.Generator().manual_seed(1))
    scores = vlm.score(prompt, completions)
    (scores.logps * weight)[completions.mask].sum().backward()
    packed = pop_gradients(vlm)
    for row in range(4):
        real = completions.mask[row]
        logps, entropy = reference_scores(vlm, prompt, completions, row)
        torch.testing.assert_close(scores.logps[row][real], logps, atol=2e-5, rtol=0)
        torch.testing.assert_close(scores.entropy[row][real], entropy, atol=2e-5, rtol=0)
        (logps * weight[row][real]).sum().backward()
    separate = pop_gradients(vlm)
    for name in packed:
        torch.testing.assert_close(packed[name], separate[name], atol=2e-4, rtol=1e-3, msg=name)


def test_only_one_chunk_of_logits_exists_at_a_time(monkeypatch):
    """The logits (G*C, V) are never materialized: the head gets at most LOGITS_PER_CHUNK // V rows
    at a time. The scores are the same."""
    vlm, rows = load(), []
    prompt, completions = ask(vlm)
    whole = vlm.score(prompt, completions)
    monkeypatch.setattr(model, "LOGITS_PER_CHUNK", 64 * 5)
    vlm.core.lm_head.register_forward_hook(lambda module, args, out: rows.append(args[0].shape[0]))
    parts = vlm.score(prompt, completions)
    torch.testing.assert_close(parts.logps, whole.logps, atol=5e-6, rtol=0)
    torch.testing.assert_close(parts.entropy, whole.entropy, atol=5e-6, rtol=0)
    parts.logps.sum().backward()
    assert max(rows) == 5
    assert sum(rows) == 2 * completions.ids.numel()  # forward pass, then again for the gradient


@pytest.mark.parametrize("split", [0, 3])
def test_only_log_probabilities_carry_gradient_and_nothing_does_under_no_grad(split):
    vlm = load(gradient_checkpointing=True, completions_per_forward=split)
    prompt, completions = ask(vlm)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            scores = vlm.score(prompt, completions)
        assert scores.logps.requires_grad == grad
        for tensor in (scores.entropy, scores.attention, scores.prompt_attention):
            assert not tensor.requires_grad and tensor.grad_fn is None
    scores = vlm.score(prompt, completions, attention=False)
    assert scores.attention is None and scores.prompt_attention is None


# --- attention ---


@pytest.mark.parametrize(
    "layers, heads", [((-1,), None), (None, None), ((0, -1), (1, 3)), ((1,), (0,))]
)
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_captured_attention_equals_eager(any_model, layers, heads, checkpointing):
    vlm = load(any_model, layers=layers, heads=heads, gradient_checkpointing=checkpointing)
    prompt, completions = ask(vlm)
    completions.mask = torch.arange(completions.ids.shape[1]) < LENGTHS
    scores = vlm.score(prompt, completions)
    scores.logps.sum().backward()  # with checkpointing, this runs every layer again
    vlm.core.set_attn_implementation("eager")
    P, image = len(prompt.input_ids), prompt.image_positions
    with torch.no_grad():
        for row in range(4):
            _, out = reference_forward(vlm, prompt, completions, row, output_attentions=True)
            maps = torch.stack([out.attentions[layer][0, vlm.heads] for layer in vlm.layers])
            maps = maps.mean((0, 1))  # (S, S)
            found = scores.attention[row][completions.mask[row]]
            torch.testing.assert_close(found, maps[P:, image], atol=1e-6, rtol=0)
            found = scores.prompt_attention
            torch.testing.assert_close(found, maps[P - 1, image], atol=1e-6, rtol=0)


# --- sampling ---


@pytest.mark.parametrize("temperature", [0, 0.7])
def test_sampling_with_cached_prompt_equals_sampling_without_cache(any_model, temperature):
    vlm = load(any_model)
    prompt, completions = ask(vlm, G=3, C=10, temperature=temperature, seed=5)
    generator = torch.Generator().manual_seed(5)
    written = torch.zeros(3, 0, dtype=torch.long)
    done = torch.zeros(3, dtype=torch.bool)
    for step in range(completions.ids.shape[1]):
        # Append a dummy token, because reference_forward drops the logits of the last one.
        padded = torch.cat([written, torch.zeros(3, 1, dtype=torch.long)], 1)
        so_far = Completions(padded, torch.ones_like(padded, dtype=torch.bool))
        with torch.no_grad():
            rows = [reference_forward(vlm, prompt, so_far, row)[0][step] for row in range(3)]
        logits = torch.stack(rows)
        logits[:, vlm.placeholders] = -torch.inf
        if temperature:
            p = (logits / temperature).softmax(-1)
            token = torch.multinomial(p, 1, generator=generator)[:, 0]
        else:
            token = logits.argmax(-1)
        assert (completions.mask[:, step] == ~done).all()
        assert (completions.ids[:, step] == token)[~done].all()
        done |= torch.isin(token, vlm.stop_ids)
        written = torch.cat([written, completions.ids[:, step : step + 1]], 1)
    assert (completions.finished == done).all()


# --- prompts ---


@pytest.mark.parametrize("any_model", ["qwen3", "qwen2_5"], indirect=True)
@pytest.mark.parametrize("size", [(112, 112), (224, 56), (60, 200), (1, 1)])
def test_image_tokens_are_at_image_positions(any_model, size):
    vlm = load(any_model)
    prompt = vlm.encode(Image.new("RGB", size, "red"), "What color is the dot on the red card?")
    rows, cols = prompt.grid
    assert rows * cols == prompt.image["image_grid_thw"].prod().item() // 4
    where = (prompt.input_ids == vlm.core.config.image_token_id).nonzero()[:, 0]
    assert torch.equal(where, prompt.image_positions) and len(where) == rows * cols
    assert (rows >= cols) == (size[1] >= size[0])
    text = vlm.tokenizer.decode(prompt.input_ids[prompt.image_positions[-1] + 1 :])
    question = "what color is the dot on the red card ?"
    assert text == f"<|vision_end|> {question} <|im_end|> <|im_start|> assistant"


def test_internvl_squeezes_an_image_to_one_tile_and_answers_as_generate_does(internvl):
    """Its processor would cut a wide image into several tiles, and write <img> and </img>."""
    vlm = load(internvl)
    prompt = vlm.encode(Image.effect_noise((200, 60), 64), "what color is the dot ?")
    assert prompt.grid == (4, 4) and prompt.image["pixel_values"].shape == (1, 3, 64, 64)
    text = vlm.tokenizer.decode(prompt.input_ids).replace(" ", "")
    image = f"<|vision_start|>{'<|image_pad|>' * 16}<|vision_end|>"  # of tiny/'s tokenizer
    assert text == f"<|im_start|>user{image}whatcoloristhedot?<|im_end|><|im_start|>assistant"
    assert len(vlm.placeholders) == 3
    settings = dict(do_sample=False, suppress_tokens=vlm.placeholders.tolist(), max_new_tokens=10)
    written = vlm.core.generate(prompt.input_ids[None], **prompt.image, **settings)
    expected = written[0, len(prompt.input_ids) :]
    assert torch.equal(vlm.sample(prompt, 1, 10, temperature=0).ids[0], expected)
    with pytest.raises(InputError, match="--max_pixels 4000: .* always uses 4096"):
        load(internvl, max_pixels=4000)


def test_question_with_a_placeholder_is_refused():
    with pytest.raises(InputError, match="image_pad"):
        load().encode(Image.new("RGB", (112, 112)), "what is <|image_pad|> ?")


def test_max_pixels_limits_the_image():
    prompt, _ = ask(load(max_pixels=56 * 56), C=1)
    assert prompt.grid == (3, 3)  # 56 px are 3.5 cells of 16 px


# --- LoRA and 4 bits ---


def test_lora_is_that_of_peft_without_its_casts():
    vlm = load(load_in_4bit=True)
    layer = vlm.core.model.language_model.layers[1].mlp.up_proj
    x = torch.randn(2, 3, layer.in_features)
    for off in (False, True):
        with vlm.model.disable_adapter() if off else nullcontext():
            torch.testing.assert_close(layer.forward(x), type(layer).forward(layer, x))
    assert (layer.forward(x) - layer.base_layer(x)).abs().max() > 1e-3
    norm = vlm.core.model.language_model.norm
    torch.testing.assert_close(norm.forward(x), type(norm).forward(norm, x))


def test_16_bit_gradients_point_where_those_in_fp32_do_and_scores_are_in_fp32():
    found, example, (_, completions) = [], Scenes("validation", 100)[0], ask(load())
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        vlm = load(dtype=dtype)
        assert vlm.dtype == dtype
        prompt = vlm.encode(example.image, example.question)
        scores = vlm.score(prompt, completions)
        scores.logps[completions.mask].sum().backward()
        gradients = [p.grad for p in trained(vlm).values()]
        kept = scores.logps, scores.entropy, scores.attention, scores.prompt_attention
        assert {x.dtype for x in (*kept, *trained(vlm).values(), *gradients)} == {torch.float32}
        found.append(torch.cat([gradient.flatten() for gradient in gradients]))
    for other in found[1:]:
        assert torch.cosine_similarity(found[0], other, dim=0) > 0.98


def quantized_layers(vlm):
    modules = vlm.core.named_modules()
    return {n: m for n, m in modules if isinstance(m, bitsandbytes.nn.Linear4bit)}


def test_4bit_on_the_cpu(any_model):
    """Only the language model is quantized, to NF4 with double quantization. LoRA is only there,
    too. Sampling, scoring and the backward pass all run."""
    vlm = load(any_model, load_in_4bit=True)
    quantized, layers = quantized_layers(vlm), vlm.core.config.text_config.num_hidden_layers
    assert len(quantized) == layers * 7 and all("language_model.layers" in n for n in quantized)
    state = next(iter(quantized.values())).weight.quant_state
    assert state.quant_type == "nf4" and state.nested
    assert len(trained(vlm)) == layers * 7 * 2
    assert all("lora_" in name and "language_model.layers" in name for name in trained(vlm))
    prompt, completions = ask(vlm)
    scores = vlm.score(prompt, completions)
    scores.logps[completions.mask].sum().backward()
    assert all(p.grad.isfinite().all() for p in trained(vlm).values())
    for row in range(4):
        real = completions.mask[row]
        logps, _ = reference_scores(vlm, prompt, completions, row)
        torch.testing.assert_close(scores.logps[row][real], logps, atol=2e-5, rtol=0)


def test_4bit_weights_are_not_repacked_without_gradient(monkeypatch):
    """On a CPU with AVX512-BF16, bitsandbytes would repack the weights in bf16 on their first use
    in eval mode, which changes the model."""
    monkeypatch.setattr(bitsandbytes.nn.modules, "has_avx512bf16", lambda: True)
    vlm = load(load_in_4bit=True)
    ask(vlm)  # eval mode, no gradient
    states = [m.weight.quant_state for m in quantized_layers(vlm).values()]
    assert states and not any(getattr(s, "packing_format_for_cpu", False) for s in states)


@pytest.mark.parametrize(
    "layers, heads, message",
    [((4,), None, "layer 4"), ((-5,), None, "layer -5"), ((-1,), (4,), "head 4")],
)
def test_nonexistent_layers_and_heads_are_refused(layers, heads, message):
    with pytest.raises(InputError, match=message):
        load_vlm(TINY, load_in_4bit=False, layers=layers, heads=heads, device="cpu")
