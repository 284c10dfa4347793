"""Decoding with few operations per token. Skip this file on a first reading.

A decoded token needs many small operations. `Decoder` runs the language model's own weights for one
new token per completion, without PEFT's wrappers and casts, and writes keys and values into buffers
of the final length. `GraphDecoder` runs the same step as a CUDA graph. tests/test_decoding.py
compares both with transformers.
"""

import torch
from bitsandbytes.functional import dequantize_4bit
from psutil import virtual_memory
from torch.nn.functional import embedding, linear, pad, rms_norm

from attention import decode_attention


class LoraLinears:
    """Linear layers with the same input: x W^T + b + (x A^T) (scale B)^T, in the type of x."""

    def __init__(self, modules, dtype, dequantize):
        self.layers, self.A, self.B, self.ranks = [], None, [], []
        down = []
        for module in modules:
            self.layers.append(fast_linear(module.base_layer, dtype, dequantize))
            if module.disable_adapters:
                continue
            for name in module.active_adapters:
                down.append(module.lora_A[name].weight)
                up = module.lora_B[name].weight * module.scaling[name]
                self.B.append(up.to(dtype).T)  # (r, out)
                self.ranks.append(len(down[-1]))
        if down:
            self.A = torch.cat(down).to(dtype).T  # (in, all r)

    def __call__(self, x):
        outputs = [layer(x) for layer in self.layers]
        if self.A is not None:
            inner = (x @ self.A).split(self.ranks, -1)
            for out, low, B in zip(outputs, inner, self.B):
                out.addmm_(low, B)
        return outputs


def fast_linear(layer, dtype, dequantize):
    """A linear layer as a function. Args: dequantize, NF4 weights now, once, instead of at every
    token. The function holds them; they are freed with the decoder."""
    state = getattr(layer.weight, "quant_state", None)
    if state is None or not dequantize:
        return layer
    weight = dequantize_4bit(layer.weight, state).to(dtype)
    return lambda x: linear(x, weight, layer.bias)


def quantized_numel(core):
    """How many weights of the language model are quantized."""
    states = [getattr(p, "quant_state", None) for p in core.model.language_model.parameters()]
    return sum(state.shape.numel() for state in states if state)


def room_for_weights(core, dtype):
    """Whether the dequantized language model takes at most half of the free memory. Not on cards
    before 8.0 (T4), where bitsandbytes' product of 4-bit weights and few rows is faster, and not
    for deterministic runs, because on a GPU the two products round differently."""
    device = core.lm_head.weight.device
    if device.type == "cpu":
        free = virtual_memory().available
    elif device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0):
        free = torch.cuda.mem_get_info(device)[0]  # and what the allocator holds but does not use:
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    else:
        return False
    enough = 2 * quantized_numel(core) * dtype.itemsize <= free
    return enough and not torch.are_deterministic_algorithms_enabled()


class DecoderLayer:
    """One layer of a language model, with the keys and values of its completions."""

    def __init__(self, layer, prompt, rows, length, dequantize):
        self.attention, self.mlp, self.prompt = layer.self_attn, layer.mlp, prompt
        dtype = prompt.keys.dtype
        self.norms = layer.input_layernorm, layer.post_attention_layernorm
        self.qkv = linears(self.attention, "q_proj k_proj v_proj", dtype, dequantize)
        self.out = linears(self.attention, "o_proj", dtype, dequantize)
        self.gate_up = linears(self.mlp, "gate_proj up_proj", dtype, dequantize)
        self.down = linears(self.mlp, "down_proj", dtype, dequantize)
        self.qk_norms = [getattr(self.attention, name, None) for name in ("q_norm", "k_norm")]
        B, kv_heads, _, D = prompt.keys.shape
        shape = B, kv_heads, rows // B, length, D
        self.keys, self.values = (
            torch.zeros(shape, dtype=dtype, device=prompt.keys.device) for _ in "kv"
        )

    def step(self, x, cos, sin, t, length, ignored):
        """Run token t of every completion. Args: x (B*G, hidden size); cos and sin (B*G, 1, D);
        t, as a slice or an index (1,); length, how many tokens of the buffers are attended to;
        ignored, see `decode_attention`."""
        B, kv_heads, G, _, D = self.keys.shape
        q, k, v = self.qkv(normalize(x, self.norms[0]))
        q, k = (
            normalize(each.view(len(x), -1, D), norm) for each, norm in zip((q, k), self.qk_norms)
        )
        heads, qk = q.shape[1], torch.cat([q, k], 1)
        qk = (qk * cos).addcmul_(qk.roll(D // 2, -1), sin)  # rotary embedding
        q, k = qk.split([heads, kv_heads], 1)
        self.keys[:, :, :, t] = k.view(B, G, kv_heads, 1, D).transpose(1, 2)
        self.values[:, :, :, t] = v.view(B, G, kv_heads, 1, D).transpose(1, 2)
        q = q.view(B, G, kv_heads, -1, D).transpose(1, 2)  # (B, kv_heads, G, h, D)
        own = self.keys[..., :length, :], self.values[..., :length, :]
        out = decode_attention(q, *own, self.prompt, self.attention.scaling, ignored)
        x = self.out(out.transpose(1, 2).reshape(len(x), -1))[0].add_(x)
        gate, up = self.gate_up(normalize(x, self.norms[1]))
        return self.down(self.mlp.act_fn(gate).mul_(up))[0].add_(x)


class Decoder:
    """The language model of `core`, for G completions of each of B prompts.

    Args: core, the transformers model with LoRA in place; prompts, a PromptCache per layer; start
    (B*G,), the position of every completion's first token; length, of the longest completion.
    """

    def __init__(self, core, prompts, start, length):
        self.core = core.model.language_model
        dtype, device = core.lm_head.weight.dtype, start.device
        layers, dequantize = zip(self.core.layers, prompts), room_for_weights(core, dtype)
        self.layers = [DecoderLayer(*each, len(start), length, dequantize) for each in layers]
        positions = start[:, None] + torch.arange(length, device=device)  # (B*G, length)
        tables = self.core.rotary_emb(prompts[0].keys, positions)
        # The three axes of M-RoPE agree in text; Qwen2.5-VL returns a table for each.
        cos, sin = (table[0] if table.dim() == 4 else table for table in tables)  # (B*G, length, D)
        sign = torch.ones_like(sin)
        sign[..., : sin.shape[-1] // 2] = -1  # x rolled by D / 2, with this sign, is rotate_half(x)
        self.cos, self.sin = (table.unsqueeze(2).unbind(1) for table in (cos, sin * sign))
        self.P, self.length, self.ignored = prompts[0].keys.shape[2], length, None
        if prompts[0].padding is not None:
            self.ignored = pad(prompts[0].padding, (0, length))  # (B, P + length)

    def step(self, token, t):
        """Feed token t (B*G,) of every completion. Returns: hidden states (B*G, hidden size)."""
        ignored = None if self.ignored is None else self.ignored[:, : self.P + t + 1]
        return self.run(token, self.cos[t], self.sin[t], slice(t, t + 1), t + 1, ignored)

    def run(self, token, *args):
        x = embedding(token, self.core.embed_tokens.weight)
        for layer in self.layers:
            x = layer.step(x, *args)
        return normalize(x, self.core.norm)


class GraphDecoder(Decoder):
    """A Decoder whose step is recorded as a CUDA graph: one launch per token instead of hundreds.

    All shapes are fixed: a token attends to the whole buffers, and later tokens are ignored. Never
    run on a GPU yet. On a CPU the same step runs without a graph, for the tests.
    """

    stream = None  # of all captures: each new stream would reserve memory of its own

    def __init__(self, core, prompts, start, length):
        super().__init__(core, prompts, start, length)
        self.token, self.t, self.graph = torch.zeros_like(start), torch.zeros_like(start[:1]), None
        self.cos, self.sin = torch.stack(self.cos), torch.stack(self.sin)  # (length, B*G, 1, D)
        if self.ignored is None:
            self.ignored = torch.zeros(1, self.P + length, dtype=torch.bool, device=start.device)
        self.places = torch.arange(-self.P, length, device=start.device)

    def step(self, token, t):
        self.token.copy_(token)
        self.t.fill_(t)
        if token.is_cuda and not self.graph:
            self.record()
        if self.graph:
            self.graph.replay()
        else:
            self.fixed_step()
        return self.output

    def fixed_step(self):
        cos, sin = (table.index_select(0, self.t)[0] for table in (self.cos, self.sin))
        ignored = self.ignored | (self.places > self.t)
        self.output = self.run(self.token, cos, sin, self.t, self.length, ignored)

    def record(self):
        stream = GraphDecoder.stream = GraphDecoder.stream or torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # a first run, in which libraries allocate their memory
            self.fixed_step()
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, stream=stream):
            self.fixed_step()


def linears(parent, names, dtype, dequantize):
    return LoraLinears([getattr(parent, name) for name in names.split()], dtype, dequantize)


def normalize(x, norm):
    """RMSNorm as one operation; None, as in Qwen2.5-VL's heads, changes nothing."""
    return x if norm is None else rms_norm(x, x.shape[-1:], norm.weight, norm.variance_epsilon)
