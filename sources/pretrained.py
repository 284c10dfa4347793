"""Load a pretrained model, or an adapter, from the hub or a folder. Whatever goes wrong ends in one
line that says what to do."""

from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageTextToText,
    AutoTokenizer,
    BitsAndBytesConfig,
)
from transformers.utils.logging import disable_progress_bar

from config import InputError

SUPPORTED = ("qwen2_5_vl", "qwen3_vl")
LORA_TARGETS = r".*language_model\.layers.*\.(q|k|v|o|gate|up|down)_proj"


def choose_device(device=None):
    """The device for a name, None or "auto", and its compute type: bf16 where a card has it, else
    fp16; fp32 on a CPU. Raises: InputError if there is no CUDA."""
    cuda = torch.cuda.is_available()
    device = torch.device(("cuda" if cuda else "cpu") if device in (None, "auto") else device)
    if device.type == "cpu":
        return device, torch.float32
    if not cuda:
        raise InputError(f"device {device}: no CUDA here; choose --device cpu")
    return device, torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16


def load_pretrained(name, load_in_4bit, device, dtype):
    """The transformers model, its tokenizer and its image processor. With `load_in_4bit` the
    language model is quantized to NF4; vision tower, embeddings and output head never are.
    Raises: InputError."""
    disable_progress_bar()
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=[".*visual", "lm_head"],
    )
    safe = {"trust_remote_code": False}  # else transformers asks whether to run code of the folder
    try:
        model_type = AutoConfig.from_pretrained(name, **safe).model_type
        if model_type not in SUPPORTED:
            raise InputError(f"{name} is a {model_type}; supported are {' and '.join(SUPPORTED)}")
        tokenizer = AutoTokenizer.from_pretrained(name, **safe)
        processor = AutoImageProcessor.from_pretrained(name, backend="pil", **safe)
        model = AutoModelForImageTextToText.from_pretrained(
            name,
            dtype=dtype,
            quantization_config=quantization if load_in_4bit else None,
            use_safetensors=True,  # never a pickle
            attn_implementation="sayo",
            device_map={"": device},
            **safe,
        )
    except torch.OutOfMemoryError:
        advice = "choose a smaller model, or drop --no-load_in_4bit"
        raise InputError(f"{name} does not fit on {device}: {advice}") from None
    except ImportError as error:
        advice = "pip install bitsandbytes, or give --no-load_in_4bit"
        raise InputError(f"{advice} ({error})") from None
    except InputError:
        raise
    except (OSError, ValueError) as error:
        reason = "cannot be loaded from the hub: check the name and the network"
        if Path(name).exists():
            reason = "is not a model folder"
        raise InputError(f"{name} {reason} ({str(error).splitlines()[0]})") from None
    for module in model.modules():
        # On some CPUs bitsandbytes repacks frozen weights in bf16 when they are first used without
        # gradient: sampling and training would then be two different models.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model, tokenizer, processor


def add_lora(model, r, alpha):
    """The PEFT model: everything frozen but LoRA on the language model's linear layers."""
    model.requires_grad_(False)
    lora = LoraConfig(r=r, lora_alpha=alpha, target_modules=LORA_TARGETS)
    return get_peft_model(model, lora)


def load_adapter(model, folder):
    """Load an adapter's weights into a PEFT model. Raises: InputError if they do not fit."""
    try:
        weights = load_file(Path(folder) / "adapter_model.safetensors")
        loaded = set_peft_model_state_dict(model, weights)
    except (OSError, SafetensorError) as error:
        raise InputError(f"no adapter in {folder}: {error}") from None
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"the adapter in {folder} has another --lora_r ({reason})") from None
    if loaded.unexpected_keys:
        name = loaded.unexpected_keys[0]
        raise InputError(f"the adapter in {folder} is for another model: it has {name}")
