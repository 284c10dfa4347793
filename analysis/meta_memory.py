"""Counts the memory of a program that runs on meta tensors. They have shapes but no data, so no GPU
and no weights are needed. Operations that mix devices raise an error, as they would on a GPU."""

import weakref
from contextlib import contextmanager
from typing import NamedTuple

import torch
from bitsandbytes.backends.default.ops import _gemm_4bit_default_impl
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from torch.utils.weak import WeakTensorKeyDictionary

aten = torch.ops.aten
BLOCK = 512  # bytes: CUDA's allocator rounds up to this
MAX_KNOWN = 2**22  # elements
TAKE_CPU_INDICES = {"index", "index_put", "index_put_", "_index_put_impl_"}
COPIES = {"_to_copy", "copy_", "copy"}
DEPEND_ON_DATA = {"nonzero", "repeat_interleave", "unique_consecutive", "masked_select"}


class MetaMemory(TorchDispatchMode):
    """While active, counts the bytes of live meta tensors and records the peak of each phase.

    A program that reads values gets replacements, so it can continue:
    - Integers and masks of moderate size are also computed on the CPU, so they are exact. Sampled
      tokens are token 0.
    - Other tensors copied to the CPU contain ones, and `.item()` returns one.
    """

    def __init__(self):
        super().__init__()
        self.current, self.peaks, self.phase = 0, {}, None
        self.alive = {}  # storage -> a weak reference to it
        self.pure, self.forms = {}, {}  # see `run`
        self.known = WeakTensorKeyDictionary()  # meta tensor -> the CPU tensor with its data

    def enter(self, phase):
        """Start or continue `phase`; later peaks belong to it."""
        self.phase = phase
        self.peaks[phase] = max(self.peaks.get(phase, 0), self.current)

    def track(self, tensor):
        """Count a tensor until it is freed."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.alive:
            return
        size = -(-storage.nbytes() // BLOCK) * BLOCK

        def free(_):
            del self.alive[key]
            self.current -= size

        self.alive[key] = weakref.ref(storage, free)
        self.current += size
        if self.current > self.peaks.get(self.phase, 0):
            self.peaks[self.phase] = self.current

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = function._schema.name.partition("::")[2]
        if name == "gemm_4bit":  # a GPU may fuse it; otherwise it dequantizes the weight first
            with self:
                return _gemm_4bit_default_impl(*args, **kwargs)
        if name == "_local_scalar_dense" and args[0].is_meta:
            return self.to_cpu(args[0]).item()
        if name == "_to_copy" and args[0].is_meta and not on_meta(kwargs, default=True):
            return self.to_cpu(args[0]).to(kwargs.get("dtype"))
        if name in ("index", "index_put", "index_put_"):
            args = (args[0], self.without_masks(args[1]), *args[2:])
        elif name in DEPEND_ON_DATA and args[0].is_meta:
            return tree_map(self.as_meta, self.on_cpu(function, args, kwargs))
        out = self.run(function, name, args, kwargs)
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor) and tensor.is_meta:
                self.track(tensor)
        self.follow(name, function, args, kwargs, out)
        return out

    def run(self, function, name, args, kwargs):
        """Call a function on meta tensors. If the results share no memory with the arguments, their
        forms depend only on the arguments' forms, so they are cached. PyTorch itself is slow."""
        if function not in self.pure:
            schema = function._schema
            self.pure[function] = not any(
                x.alias_info for x in [*schema.arguments, *schema.returns]
            )
        key = self.pure[function] and (function, form(args), form(tuple(kwargs.items())))
        if key in self.forms:
            return from_form(self.forms[key])
        inputs = tensors_in((args, tuple(kwargs.values())))
        check_devices(function, name, inputs)
        out = function(*args, **kwargs)
        if key and (new := tensors_in(out)) and all(x.is_meta for x in new):
            if not storages(new) & storages(inputs):  # _unsafe_view's schema hides that it shares
                self.forms[key] = form(out)
        return out

    def follow(self, name, function, args, kwargs, out):
        """Compute integers and masks on the CPU as well."""
        if not isinstance(out, torch.Tensor) or out.is_floating_point() or out.numel() > MAX_KNOWN:
            return
        if name == "argmax":  # a sampled token
            self.known[out] = torch.zeros(out.shape, dtype=out.dtype)
            return
        try:
            self.known[out] = self.on_cpu(function, args, kwargs)
        except KeyError:
            self.known.pop(out, None)  # overwritten with unknown values

    def on_cpu(self, function, args, kwargs):
        """Call a function on the known values. Raises: KeyError if an argument is unknown."""

        def find(x):
            if isinstance(x, torch.Tensor):
                return self.known[x] if x.is_meta else x
            return torch.device("cpu") if isinstance(x, torch.device) else x

        args, kwargs = tree_map(find, (args, kwargs))
        return function(*args, **kwargs)

    def as_meta(self, tensor):
        out = tensor.to("meta")
        self.track(out)
        self.known[out] = tensor
        return out

    def to_cpu(self, tensor):
        return self.known.get(tensor, torch.ones(tensor.shape, dtype=tensor.dtype))

    def without_masks(self, indices):
        """Indices with every mask replaced by the positions where it is true."""
        found = []
        for index in indices:
            mask = isinstance(index, torch.Tensor) and index.dtype == torch.bool
            if mask and index.is_meta:
                found += [self.as_meta(i) for i in self.to_cpu(index).nonzero(as_tuple=True)]
            else:
                found.append(index)
        return found


def on_meta(kwargs, default=False):
    device = kwargs.get("device")
    return default if device is None else torch.device(device).type == "meta"


def check_devices(function, name, tensors):
    """Raises: RuntimeError if an operation would fail on a GPU because a tensor is on the CPU."""
    if len({x.is_meta for x in tensors if x.dim()}) > 1 and name not in COPIES | TAKE_CPU_INDICES:
        shapes = ", ".join(f"{tuple(x.shape)} on {x.device}" for x in tensors)
        raise RuntimeError(f"{function} mixes devices: {shapes}")


def tensors_in(x):
    """The tensors in nested tuples and lists. torch.utils._pytree is several times slower."""
    if isinstance(x, torch.Tensor):
        return [x]
    return [t for y in x for t in tensors_in(y)] if isinstance(x, tuple | list) else []


def storages(tensors):
    return {x.untyped_storage()._cdata for x in tensors}


class Form(NamedTuple):
    """The metadata of a tensor."""

    shape: torch.Size
    stride: tuple[int]
    dtype: torch.dtype
    device: torch.device


def form(x):
    """The hashable metadata of an argument or a result."""
    if isinstance(x, torch.Tensor):
        return Form(x.shape, x.stride(), x.dtype, x.device)
    if isinstance(x, tuple | list):
        return (type(x) is list, *map(form, x))
    return type(x), x


def from_form(x):
    """A result with this form."""
    if isinstance(x, Form):
        return torch.empty_strided(x.shape, x.stride, dtype=x.dtype, device=x.device)
    if isinstance(x[0], bool):
        return (tuple, list)[x[0]](map(from_form, x[1:]))
    return x[1]


@contextmanager
def meta_as_device(name):
    """Make two PyTorch functions treat meta tensors like tensors on `name`, "cuda" or "cpu".

    For attention PyTorch would use the kernel with the highest memory use, unlike either device.
    `torch.tensor` would lose the values. A TorchFunctionMode cannot replace these patches, because
    it is off during backward passes and therefore during recomputation.
    """
    functional = torch.nn.functional
    real_attention, real_tensor = functional.scaled_dot_product_attention, torch.tensor

    def attention(q, k, v, *args, **kwargs):
        run = meta_attention if q.is_meta else real_attention
        return run(q, k, v, *args, **kwargs | ({"name": name} if q.is_meta else {}))

    def tensor(data, **kwargs):
        if not on_meta(kwargs):
            return real_tensor(data, **kwargs)
        return real_tensor(data, **kwargs | {"device": "cpu"}).to("meta")

    functional.scaled_dot_product_attention, torch.tensor = attention, tensor
    try:
        yield
    finally:
        functional.scaled_dot_product_attention, torch.tensor = real_attention, real_tensor


def meta_attention(
    q,
    k,
    v,
    attn_mask=None,
    dropout_p=0.0,
    is_causal=False,
    scale=None,
    enable_gqa=False,
    name="cuda",
):
    """Attention with the kernel that `name`, "cuda" or "cpu", would use."""
    if attn_mask is not None:
        attn_mask = torch.zeros(attn_mask.shape, dtype=q.dtype, device=q.device)
    if name == "cpu":
        settings = {"attn_mask": attn_mask, "scale": scale}
        return aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, is_causal, **settings
        )[0]
    if attn_mask is None:
        return aten._scaled_dot_product_flash_attention(q, k, v, 0.0, is_causal, scale=scale)[0]
    bias = attn_mask.expand(*q.shape[:3], k.shape[2])
    settings = bias, torch.is_grad_enabled(), 0.0, is_causal
    return aten._scaled_dot_product_efficient_attention(q, k, v, *settings, scale=scale)[0]
