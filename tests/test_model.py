"""model.py against independent paths: the library's own forward, one completion at a time, and eager attention."""

from types import SimpleNamespace

import bitsandbytes
import pytest
import torch
from conftest import TINY, ask, load
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

import attention
import model
from data import InputError
from model import Completions, load_vlm
from scenes import Scenes


@pytest.fixture(params=["qwen3", "qwen2_5"])
def folder(request, qwen2_5):
    return {"qwen3": TINY, "qwen2_5": qwen2_5}[request.param]


def naive(vlm, prompt, completions, row, **kwargs):
    """The library's own forward of one unpadded [image, prompt, completion]: logits (C_i, V) that predict each token,
    and the whole output. Positions and vision features are the library's, too."""
    ids = torch.cat([prompt.input_ids, completions.ids[row][completions.mask[row]]])[None]
    kinds = torch.zeros_like(ids)
    kinds[0, prompt.image_positions] = 1
    vlm.core.model.rope_deltas = None
    out = vlm.core(input_ids=ids, mm_token_type_ids=kinds, pixel_values=prompt.pixel_values,
                   image_grid_thw=prompt.image_grid_thw, use_cache=False, **kwargs)  # fmt: skip
    return out.logits[0, len(prompt.input_ids) - 1 : -1].float(), out


def naive_scores(vlm, prompt, completions, row):
    logits, _ = naive(vlm, prompt, completions, row)
    logits = logits / completions.temperature
    logits[:, vlm.placeholders] = -torch.inf
    logps = logits.log_softmax(-1)
    entropy = -(logps.exp() * logps.clamp(min=-1e9)).sum(-1)
    ids = completions.ids[row][completions.mask[row]]
    return logps.gather(1, ids[:, None])[:, 0], entropy


def gradients(vlm):
    grads = {n: p.grad.clone() for n, p in vlm.model.named_parameters() if p.requires_grad}
    vlm.model.zero_grad()
    return grads


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("split", [0, 3, 1])
def test_packed_group_equals_separate_forwards(folder, checkpointing, split):
    """Shared prefix, padding, M-RoPE positions, chunked projection: same log-probabilities, entropies, gradients."""
    vlm = load(folder, gradient_checkpointing=checkpointing, completions_per_forward=split)
    prompt, completions = ask(vlm, temperature=1.3)
    # unequal lengths, so that there is padding to go wrong
    completions.mask = torch.arange(completions.ids.shape[1]) < torch.tensor([[12], [7], [1], [10]])
    weight = torch.randn(completions.ids.shape, generator=torch.Generator().manual_seed(1))
    scores = vlm.score(prompt, completions)
    (scores.logps * weight)[completions.mask].sum().backward()
    packed = gradients(vlm)
    for row in range(4):
        real = completions.mask[row]
        logps, entropy = naive_scores(vlm, prompt, completions, row)
        torch.testing.assert_close(scores.logps[row][real], logps, atol=2e-5, rtol=0)
        torch.testing.assert_close(scores.entropy[row][real], entropy, atol=2e-5, rtol=0)
        (logps * weight[row][real]).sum().backward()
    separate = gradients(vlm)
    for name in packed:
        torch.testing.assert_close(packed[name], separate[name], atol=2e-4, rtol=1e-3, msg=name)


def test_projection_in_chunks_changes_nothing(monkeypatch):
    vlm = load()
    prompt, completions = ask(vlm)
    whole = vlm.score(prompt, completions)
    monkeypatch.setattr(model, "LOGITS", 64 * 5)  # five rows of the vocabulary at a time
    parts = vlm.score(prompt, completions)
    torch.testing.assert_close(parts.logps, whole.logps, atol=1e-6, rtol=0)
    torch.testing.assert_close(parts.entropy, whole.entropy, atol=1e-6, rtol=0)


def test_no_more_logits_than_a_chunk_are_alive(monkeypatch):
    """(G*C, V) never exists: the head sees at most LOGITS // V rows at a time."""
    vlm = load()
    prompt, completions = ask(vlm)
    monkeypatch.setattr(model, "LOGITS", 64 * 5)
    seen = []
    vlm.core.lm_head.register_forward_hook(lambda module, args, out: seen.append(args[0].shape[0]))
    vlm.score(prompt, completions).logps.sum().backward()
    assert max(seen) == 5 and sum(seen) == 2 * completions.ids.numel()  # once forward, once again for the gradient


@pytest.mark.parametrize("layers, heads", [((-1,), None), (None, None), ((0, -1), (1, 3)), ((1,), (0,))])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_captured_attention_equals_eager(folder, layers, heads, checkpointing):
    vlm = load(folder, layers=layers, heads=heads, gradient_checkpointing=checkpointing)
    prompt, completions = ask(vlm)
    completions.mask = torch.arange(completions.ids.shape[1]) < torch.tensor([[12], [7], [1], [10]])
    scores = vlm.score(prompt, completions)
    scores.logps.sum().backward()  # with checkpointing this runs every layer again
    vlm.core.set_attn_implementation("eager")
    P = len(prompt.input_ids)
    with torch.no_grad():
        for row in range(4):
            _, out = naive(vlm, prompt, completions, row, output_attentions=True)
            maps = torch.stack([out.attentions[layer][0, vlm.heads] for layer in vlm.layers]).mean((0, 1))  # (S, S)
            expected = maps[P:, prompt.image_positions]
            torch.testing.assert_close(scores.attention[row][completions.mask[row]], expected, atol=1e-6, rtol=0)
            torch.testing.assert_close(scores.prompt_attention, maps[P - 1, prompt.image_positions], atol=1e-6, rtol=0)


def test_checkpointing_does_not_capture_twice(monkeypatch):
    """The backward pass runs every layer again; the map is there already."""
    calls, original = [], attention.image_attention
    monkeypatch.setattr(attention, "image_attention", lambda *args: calls.append(1) or original(*args))
    vlm = load(gradient_checkpointing=True, layers=(1, 3))
    vlm.score(*ask(vlm)).logps.sum().backward()
    assert len(calls) == 2


def test_the_library_still_masks_padding():
    """Registering the attention function alone would leave the mask None, without a word: padding would be seen."""
    vlm = load()
    ids = torch.tensor([[12, 13, 14, 15, 16]])
    padded = torch.cat([torch.full((1, 3), vlm.pad_id), ids], 1)
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1]])
    positions = (mask.cumsum(-1) - 1).clamp(min=0).expand(3, 1, -1)
    with torch.no_grad():
        plain = vlm.core(input_ids=ids).logits
        other = vlm.core(input_ids=padded, attention_mask=mask, position_ids=positions).logits[:, 3:]
    torch.testing.assert_close(plain, other, atol=1e-5, rtol=0)


def test_a_completion_sees_the_prompt_and_its_own_past_only():
    """Another token in the second of three answers changes what follows in that answer, to the bit nothing else."""
    vlm = load()
    prompt, completions = ask(vlm, G=3, C=6)
    other = Completions(completions.ids.clone(), completions.mask)
    other.ids[1, 2] = (other.ids[1, 2] + 7) % 40 + 10
    with torch.no_grad():
        a, b = vlm.score(prompt, completions), vlm.score(prompt, other)
    changed = a.entropy != b.entropy  # before token j, so from the token after the changed one on
    assert changed.int().tolist() == [[0] * 6, [0, 0, 0, 1, 1, 1], [0] * 6]
    changed = (a.attention != b.attention).any(-1)  # of token j itself
    assert changed.int().tolist() == [[0] * 6, [0, 0, 1, 1, 1, 1], [0] * 6]


class Largest(TorchDispatchMode):
    """The size of the largest tensor that any operation makes."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.numel = max(self.numel, out.untyped_storage().nbytes() // out.element_size())
        return out


def test_attention_never_grows_with_the_square_of_the_whole():
    """By hand: capture makes nothing larger than (1 + G*C) x (P + C), the output nothing larger than its keys, G times;
    the packed sequence is 2,100 long, its square 4.4 million."""
    P, G, C, D = 100, 20, 100, 4
    query, key = torch.randn(1, 2, P + G * C, D), torch.randn(1, 1, P + G * C, D)
    capture = attention.Capture([0], [0, 1], torch.arange(10))
    with Largest() as largest:
        attention.image_attention(query, key, (P, G, C), capture, 0.5)
    assert largest.numel == (1 + G * C) * (P + C)
    layer = SimpleNamespace(layer_idx=0, scaling=0.5, is_causal=True, num_key_value_groups=2)
    sees = torch.ones(1, 1, C, P + C, dtype=torch.bool).tril(P)
    with Largest() as largest, torch.no_grad():
        attention.sayo_attention(layer, query, key, key, sees, packed=(P, G, C), scaling=0.5)
    assert largest.numel < 100_000


@pytest.mark.parametrize("temperature", [0, 0.7])
def test_sampling_beside_the_prompt_s_cache_equals_sampling_without_cache(folder, temperature):
    vlm = load(folder)
    prompt, completions = ask(vlm, G=3, C=10, temperature=temperature, seed=5)
    generator = torch.Generator().manual_seed(5)
    written = Completions(torch.zeros(3, 0, dtype=torch.long), torch.zeros(3, 0, dtype=torch.bool))
    done = torch.zeros(3, dtype=torch.bool)
    for step in range(completions.ids.shape[1]):
        padded = torch.cat([written.ids, torch.zeros(3, 1, dtype=torch.long)], 1)  # a token, so that one is predicted
        everything = Completions(padded, torch.ones_like(padded, dtype=torch.bool))
        with torch.no_grad():
            logits = torch.stack([naive(vlm, prompt, everything, row)[0][step] for row in range(3)])
        logits[:, vlm.placeholders] = -torch.inf
        if temperature:
            token = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)[:, 0]
        else:
            token = logits.argmax(-1)
        assert (completions.mask[:, step] == ~done).all()
        assert (completions.ids[:, step] == token)[~done].all()
        done |= torch.isin(token, vlm.stop_ids)
        written.ids = torch.cat([written.ids, completions.ids[:, step : step + 1]], 1)
    assert (completions.finished == done).all()


def test_groups_side_by_side_equal_groups_alone(folder):
    """Greedy answers to questions of unequal length, and with sampling the tokens that the same draws give: padding of
    a shorter prompt is never looked at. Each group is as wide as its own longest answer."""
    vlm = load(folder)
    scenes = Scenes("validation", 100)
    questions = [scenes[0].question, "dot", scenes[1].question + " the red card"]
    prompts = [vlm.encode(scenes[i].image, question) for i, question in enumerate(questions)]
    assert len({len(p.input_ids) for p in prompts}) == 3
    together = vlm.sample_groups(prompts, 2, 12, temperature=0)
    for prompt, group in zip(prompts, together):
        alone = vlm.sample(prompt, 2, 12, temperature=0)
        assert torch.equal(group.ids, alone.ids) and torch.equal(group.mask, alone.mask)
        assert group.texts == alone.texts and torch.equal(group.finished, alone.finished)
    for group in vlm.sample_groups(prompts, 4, 30, generator=torch.Generator().manual_seed(3)):
        assert group.mask[:, -1].any() and group.ids.shape == group.mask.shape


def test_what_is_decoded_side_by_side_is_what_score_scores(folder):
    """The log-probabilities that sampling works with, token by token, are those of the packed forward."""
    vlm = load(folder)
    scenes, seen = Scenes("validation", 100), []
    prompts = [vlm.encode(scenes[0].image, scenes[0].question), vlm.encode(scenes[1].image, "dot")]
    original = vlm._logits
    vlm._logits = lambda *args: seen.append(original(*args)) or seen[-1]
    groups = vlm.sample_groups(prompts, 3, 8, generator=torch.Generator().manual_seed(1))
    vlm._logits = original
    logps = torch.stack(seen, 1).log_softmax(-1)  # (B*G, C, V)
    for i, (prompt, group) in enumerate(zip(prompts, groups)):
        C = group.ids.shape[1]
        expected = logps[3 * i : 3 * i + 3, :C].gather(-1, group.ids[..., None])[..., 0]
        found = vlm.score(prompt, group).logps
        torch.testing.assert_close(found[group.mask], expected[group.mask], atol=1e-5, rtol=0)


def test_completions_end_with_the_stop_token_and_are_masked_by_position():
    vlm = load()
    _, completions = ask(vlm, G=8, C=24)
    assert completions.finished.any()
    for ids, mask, finished in zip(completions.ids, completions.mask, completions.finished):
        n = int(mask.sum())
        assert mask[:n].all()  # padding is on the right
        stops = torch.isin(ids[:n], vlm.stop_ids)
        assert not stops[:-1].any() and stops[-1] == finished


def test_a_padding_token_that_the_model_wrote_is_no_padding():
    """Were the mask ids == pad, such a token would be lost from the score."""
    vlm = load()
    prompt, completions = ask(vlm)
    completions.ids[0, 3] = vlm.pad_id
    scores = vlm.score(prompt, completions)
    logps, _ = naive_scores(vlm, prompt, completions, 0)
    torch.testing.assert_close(scores.logps[0][completions.mask[0]], logps, atol=2e-5, rtol=0)


def test_placeholders_are_neither_sampled_nor_scored():
    vlm = load()
    with torch.no_grad():  # a head that would write nothing else
        vlm.core.lm_head.weight[vlm.placeholders] *= 100
        vlm.core.lm_head.weight[vlm.placeholders] += 1
    prompt, completions = ask(vlm, G=8, C=24, temperature=5.0)
    assert len(vlm.placeholders) == 4
    assert not torch.isin(completions.ids, torch.tensor(vlm.placeholders)).any()
    scores = vlm.score(prompt, completions)
    assert scores.entropy.isfinite().all() and scores.logps[completions.mask].isfinite().all()


def test_only_log_probabilities_carry_gradient():
    vlm = load()
    scores = vlm.score(*ask(vlm))
    assert scores.logps.requires_grad
    assert not scores.entropy.requires_grad and not scores.attention.requires_grad
    with torch.no_grad():
        assert not vlm.score(*ask(vlm)).logps.requires_grad
    assert vlm.score(*ask(vlm), attention=False).attention is None


def test_reference_is_the_model_without_adapter():
    vlm = load()
    prompt, completions = ask(vlm)
    with torch.no_grad():
        reference, trained = (vlm.score(prompt, completions, reference=r).logps for r in (True, False))
        for name, p in vlm.model.named_parameters():
            if "lora_B" in name:
                p.zero_()
        torch.testing.assert_close(reference, vlm.score(prompt, completions).logps, atol=1e-6, rtol=0)
    assert (reference - trained).abs().max() > 1e-3


def test_the_vision_tower_runs_once_for_an_example():
    vlm, runs = load(), []
    vlm.core.model.visual.register_forward_hook(lambda *args: runs.append(1))
    prompt, completions = ask(vlm)
    vlm.score(prompt, completions)
    vlm.score(prompt, completions, reference=True)
    assert len(runs) == 1


@pytest.mark.parametrize("size", [(112, 112), (224, 56), (60, 200), (1, 1)])
def test_image_tokens_lie_where_the_prompt_says(folder, size):
    vlm = load(folder)
    prompt = vlm.encode(Image.new("RGB", size, "red"), "What color is the dot on the red card?")
    rows, cols = prompt.grid
    assert len(prompt.image_positions) == rows * cols == prompt.image_grid_thw.prod().item() // 4
    assert (prompt.input_ids[prompt.image_positions] == vlm.core.config.image_token_id).all()
    assert (prompt.input_ids == vlm.core.config.image_token_id).sum() == rows * cols
    assert (rows >= cols) == (size[1] >= size[0])
    text = vlm.tokenizer.decode(prompt.input_ids[prompt.image_positions[-1] + 1 :])
    assert text == "<|vision_end|> what color is the dot on the red card ? <|im_end|> <|im_start|> assistant"


def test_a_question_with_a_placeholder_is_refused():
    with pytest.raises(InputError, match="image_pad"):
        load().encode(Image.new("RGB", (112, 112)), "what is <|image_pad|> ?")


# --- four bits -------------------------------------------------------------------------------------------------------


def test_four_bits_on_the_cpu():
    """NF4, double quantised, language model only; sampling, scoring and the gradient all run."""
    vlm = load(load_in_4bit=True)
    quantized = {n for n, m in vlm.core.named_modules() if isinstance(m, bitsandbytes.nn.Linear4bit)}
    assert len(quantized) == 4 * 7 and all("language_model.layers" in n for n in quantized)
    state = next(m for m in vlm.core.modules() if isinstance(m, bitsandbytes.nn.Linear4bit)).weight.quant_state
    assert state.quant_type == "nf4" and state.nested
    prompt, completions = ask(vlm)
    scores = vlm.score(prompt, completions)
    scores.logps[completions.mask].sum().backward()
    assert all(p.grad.isfinite().all() for p in vlm.model.parameters() if p.requires_grad)
    for row in range(4):
        logps, _ = naive_scores(vlm, prompt, completions, row)
        torch.testing.assert_close(scores.logps[row][completions.mask[row]], logps, atol=2e-5, rtol=0)


def test_four_bits_stay_the_same_model_without_gradient(monkeypatch):
    """On a CPU with AVX512-BF16 bitsandbytes would repack the weights in bf16 at the first use in eval mode."""
    monkeypatch.setattr(bitsandbytes.nn.modules, "has_avx512bf16", lambda: True)
    vlm = load(load_in_4bit=True)
    prompt, completions = ask(vlm)  # eval mode, no gradient
    weights = [m.weight for m in vlm.core.modules() if isinstance(m, bitsandbytes.nn.Linear4bit)]
    assert not any(getattr(w.quant_state, "packing_format_for_cpu", False) for w in weights)


# --- loading ---------------------------------------------------------------------------------------------------------


def test_only_lora_in_the_language_model_is_trainable(folder):
    vlm = load(folder)
    trainable = [n for n, p in vlm.model.named_parameters() if p.requires_grad]
    layers = vlm.core.config.text_config.num_hidden_layers
    assert len(trainable) == layers * 7 * 2
    assert all("lora_" in n and "language_model.layers" in n for n in trainable)


def test_max_pixels_bounds_the_image():
    vlm = load(max_pixels=56 * 56)
    example = Scenes("validation", 1)[0]
    assert vlm.encode(example.image, example.question).grid == (3, 3)  # 56 px are 3.5 cells of 16 px


@pytest.mark.parametrize("layers, heads, word", [((4,), None, "layer 4"), ((-5,), None, "layer -5"),
                                                 ((-1,), (4,), "head 4")])  # fmt: skip
def test_layers_and_heads_that_do_not_exist_are_refused(layers, heads, word):
    with pytest.raises(InputError, match=word):
        load_vlm(TINY, load_in_4bit=False, layers=layers, heads=heads, device="cpu")
