"""Counts the memory of a program that runs on meta tensors. They have shapes but no data, so no GPU
and no weights are needed. An operation that mixes devices raises an error, as it would on a GPU."""

import weakref
from collections import defaultdict

import torch
from bitsandbytes.backends.default.ops import _gemm_4bit_default_impl
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.weak import WeakTensorKeyDictionary

META = torch.device("meta")
BLOCK = 512  # bytes: CUDA's allocator rounds up to this
TAKE_CPU_INDICES = {"index", "index_put", "index_put_", "_index_put_impl_"}
create_tensor = torch.tensor  # for `tensor_with_values`, which replaces it


class MetaMemory(TorchDispatchMode):
    """While active, counts the bytes of live meta tensors and records the peak of each phase.

    A program that reads values gets replacements, so it can continue:
    - Integers and masks that depend on nothing else are also computed on the CPU, so they are
      exact. Sampled tokens are token 0.
    - Other tensors copied to the CPU contain random numbers, so that rewards differ.
    """

    def __init__(self):
        super().__init__()
        self.current, self.phase = 0, None  # bytes
        self.peaks = defaultdict(int)  # phase -> bytes
        self.counted = weakref.WeakSet()  # storages
        self.results = {}  # function and layouts of its arguments -> layout of the result
        self.known = WeakTensorKeyDictionary()  # meta tensor -> the CPU tensor with its data

    def enter(self, phase):
        """Start or continue `phase`; later peaks belong to it."""
        self.phase = phase
        self.add(0)

    def add(self, size):
        self.current += size
        self.peaks[self.phase] = max(self.peaks[self.phase], self.current)

    def count(self, tensor):
        """Count a tensor until it is freed. A view shares its storage and is free."""
        storage = tensor.untyped_storage()
        if storage not in self.counted:
            size = -(-storage.nbytes() // BLOCK) * BLOCK
            self.counted.add(storage)
            weakref.finalize(storage, self.add, -size)
            self.add(size)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name, device = function._schema.name.partition("::")[2], kwargs.get("device")
        arguments = leaves((args, tuple(kwargs.items())))
        inputs = [x for x in arguments if isinstance(x, torch.Tensor)]
        if device != META and not any(x.is_meta for x in inputs):
            return function(*args, **kwargs)
        if name == "_local_scalar_dense" or device not in (None, META):  # `.item()`, `.cpu()`
            return function(self.values(args[0]), *args[1:], **kwargs)
        if name == "gemm_4bit":  # a GPU may fuse it; otherwise it dequantizes the weight first
            with self:
                return _gemm_4bit_default_impl(*args, **kwargs)
        if len({x.is_meta for x in inputs if x.dim()}) > 1 and name not in TAKE_CPU_INDICES:
            raise RuntimeError(f"{function} mixes devices: {[x.device for x in inputs]}")
        on_cpu = kwargs | ({"device": "cpu"} if device else {})
        if inputs and all(x in self.known or not x.is_meta for x in inputs):
            args, kwargs = tree_map_only(torch.Tensor, self.values, (args, on_cpu))
            return tree_map_only(torch.Tensor, self.to_meta, function(*args, **kwargs))
        out = self.run(function, arguments, args, kwargs)
        for x in leaves(out):
            if isinstance(x, torch.Tensor):
                self.count(x)
        if name == "argmax":  # a sampled token
            self.known[out] = torch.zeros(out.shape, dtype=out.dtype)
        elif not inputs and not out.is_floating_point():
            self.known[out] = function(*args, **on_cpu)
        return out

    def run(self, function, arguments, args, kwargs):
        """Call a function. The layout of a new tensor depends only on the arguments' layouts, so it
        is computed once: PyTorch takes long to compute it."""
        key = function, *map(layout, arguments)
        if key in self.results:
            shape, stride, dtype = self.results[key]
            return torch.empty_strided(shape, stride, dtype=dtype, device=META)
        out = function(*args, **kwargs)
        shared = [x.untyped_storage() for x in arguments if isinstance(x, torch.Tensor)]
        if isinstance(out, torch.Tensor) and out.untyped_storage() not in shared:
            self.results[key] = layout(out)
        return out

    def values(self, x):
        """The data of a tensor. If it has none: random numbers."""
        if not x.is_meta or x in self.known:
            return self.known.get(x, x)
        return torch.rand(x.shape, dtype=x.dtype)

    def to_meta(self, x):
        """A meta tensor for a known result."""
        out = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=META)
        self.count(out)
        if not x.is_floating_point():
            self.known[out] = x
        return out


def leaves(x):
    """What nested tuples and lists contain. torch.utils._pytree is several times slower."""
    return [leaf for y in x for leaf in leaves(y)] if isinstance(x, tuple | list) else [x]


def layout(x):
    return (x.shape, x.stride(), x.dtype) if isinstance(x, torch.Tensor) else (type(x), x)


def tensor_with_values(data, device=None, **kwargs):
    """Replaces torch.tensor, which would lose the values on meta."""
    return create_tensor(data, **kwargs).to(device=device)


def cuda_attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, **_):
    """Replaces F.scaled_dot_product_attention. It calls the kernels that PyTorch uses on CUDA; on
    meta, PyTorch would use one that needs more memory."""
    aten = torch.ops.aten
    if attn_mask is None:
        return aten._scaled_dot_product_flash_attention(q, k, v, 0.0, is_causal, scale=scale)[0]
    bias = q.new_zeros(attn_mask.shape).expand(*q.shape[:3], k.shape[2])
    settings = bias, torch.is_grad_enabled(), 0.0, is_causal
    return aten._scaled_dot_product_efficient_attention(q, k, v, *settings, scale=scale)[0]
