"""The checkpoint file format: tensors, step and settings, with a checksum of all of them."""

import json
import zlib

import torch
from safetensors import safe_open
from safetensors.torch import save


def pack_checkpoint(step, tensors, settings):
    """The content of a checkpoint file, as bytes. Args: step, an int; tensors, {name: CPU tensor};
    settings, a dict for JSON."""
    metadata = {"step": str(step), "settings": json.dumps(settings)}
    metadata["checksum"] = checksum(tensors, step, metadata["settings"])
    return save(tensors, metadata)


def load_checkpoint(path):
    """(step, tensors) of a checkpoint. Raises an exception of any type if the file is damaged."""
    with safe_open(path, "pt") as saved:
        metadata = saved.metadata()
        step = int(metadata["step"])
        # Copy, or the file stays mapped and Windows cannot replace it.
        tensors = {name: saved.get_tensor(name).clone() for name in saved.keys()}
    # Checkpoints of earlier versions have no settings.
    if metadata["checksum"] != checksum(tensors, step, metadata.get("settings", "")):
        raise ValueError("its checksum differs")
    return step, tensors


def checksum(tensors, step, settings):
    """CRC-32 of all data, names, shapes and types. safetensors itself only checks sizes."""
    total = zlib.crc32(settings.encode(), step)
    for name, tensor in sorted(tensors.items()):
        total = zlib.crc32(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode(), total)
        total = zlib.crc32(tensor.contiguous().reshape(-1).view(torch.uint8).numpy(), total)
    return str(total)
