"""Loads a pretrained model or an adapter from the hub or a folder. Failures become one-line
messages that say what to do."""

import json
import logging
import os
import re
import shutil
import warnings
from pathlib import Path

import torch
from huggingface_hub import get_hf_file_metadata, hf_hub_url
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageTextToText,
    AutoTokenizer,
    BitsAndBytesConfig,
    Qwen2_5_VLForConditionalGeneration,
)
from transformers.utils import cached_file
from transformers.utils.logging import disable_progress_bar

from config import InputError
from sources.packages import import_problem

SUPPORTED = ("qwen2_5_vl", "qwen3_vl")
LORA_TARGETS = r".*language_model\.layers.*\.(q|k|v|o|gate|up|down)_proj"
LORA_VARIANTS = ("use_rslora", "use_dora", "rank_pattern", "alpha_pattern")
# With fp16 as the compute type the vision tower stays in fp32, because it overflows in fp16.
Qwen2_5_VLForConditionalGeneration._keep_in_fp32_modules = ["visual"]


def choose_device(device=None, dtype=None):
    """The device for a name, None or "auto", and its compute type.

    Args: dtype, by default bf16 on a card that supports it, fp16 on other cards, fp32 on a CPU.
    Returns: (torch.device, torch.dtype). Raises: InputError if CUDA cannot be used.
    """
    cuda, automatic = torch.cuda.is_available(), device in (None, "auto")
    if not cuda and (automatic or torch.device(device).type == "cuda"):
        problem = cuda_problem()
        if problem or not automatic:
            raise InputError(problem or f"device {device}: CUDA is not available; use --device cpu")
    device = torch.device(("cuda" if cuda else "cpu") if automatic else device)
    if device.type == "cpu":
        return device, dtype or torch.float32
    check_card(device)
    return device, dtype or (torch.bfloat16 if has_bf16() else torch.float16)


def cuda_problem():
    """Why PyTorch cannot use the NVIDIA card of this machine and what to do, as text. None if there
    is no card or CUDA_VISIBLE_DEVICES hides it."""
    if not shutil.which("nvidia-smi") or os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return None
    if torch.version.cuda is None:
        reason = f"nvidia-smi is installed, but PyTorch {torch.__version__} is built without CUDA"
        return f"{reason}: {install_command('cu130')} (cu126 for an old driver), or --device cpu"
    reason = f"the NVIDIA driver is missing or too old for this PyTorch's CUDA {torch.version.cuda}"
    return f"{reason}: update it, or {install_command('cu126')}, or --device cpu"


def install_command(index):
    release = torch.__version__.split("+")[0]
    index = f"https://download.pytorch.org/whl/{index}"
    return f"pip install --force-reinstall torch=={release} --index-url {index}"


def check_card(device):
    """Raises: InputError if this PyTorch has no code for the card."""
    if torch.version.hip:
        return
    card, code = torch.cuda.get_device_capability(device), torch.cuda.get_arch_list()
    for architecture in code:
        kind, digits = re.match(r"(sm|compute)_(\d+)", architecture).groups()
        built_for = divmod(int(digits), 10)
        # Code for sm_86 runs on 8.9 as well; compute_80 is compiled for any later card.
        if built_for <= card and (kind == "compute" or built_for[0] == card[0]):
            return
    name = f"{torch.cuda.get_device_name(device)} (compute capability {card[0]}.{card[1]})"
    index = "cu126" if card < (7, 5) else "cu130"
    reason = f"PyTorch {torch.__version__} has no code for {name}, only for {' '.join(code)}"
    raise InputError(f"{reason}: {install_command(index)}, or --device cpu")


def has_bf16():
    """Whether the card supports bf16. Before compute capability 8.0 it is emulated and slow."""
    return torch.cuda.is_bf16_supported(including_emulation=False)


def load_pretrained(name, load_in_4bit, device, dtype):
    """Load a model from the hub or a folder. With `load_in_4bit` the language model is quantized to
    NF4; vision tower, embeddings and output head are not.

    Returns: the transformers model, its tokenizer and its image processor. Raises: InputError.
    """
    disable_progress_bar()
    # Hides a table of missing tensors; `load_parts` reports them in one line.
    logging.getLogger("transformers.modeling_utils").addFilter(hide_load_report)
    if device.type == "cuda":
        print_compute_type(device, dtype)
    local = Path(name).exists()
    options = {"trust_remote_code": False}  # transformers would offer to run code from the folder
    if not local and not hub_answers(name):
        options["local_files_only"] = True  # from the cache, or fail immediately
    try:
        return load_parts(name, load_in_4bit, device, dtype, options)
    except (InputError, torch.AcceleratorError):
        raise
    except torch.OutOfMemoryError:
        advice = "use a smaller model, or leave out --no-load_in_4bit"
        raise InputError(f"{name} does not fit on {device}: {advice}") from None
    except ImportError as error:
        raise import_problem(error) from None
    except SafetensorError as error:
        advice = "download it again"
        raise InputError(f"the weights in {name} are damaged: {advice} ({error})") from None
    except Exception as error:  # a damaged file can raise anything
        reason = "cannot be loaded from the hub: check the name and the network"
        if local:
            reason = "is not an intact model folder"
        raise InputError(f"{name} {reason} ({first_line(error)})") from None


def hide_load_report(record):
    return "LOAD REPORT" not in record.getMessage()


def first_line(error):
    """The first sentence of an error, with its type unless the text is enough."""
    text = (str(error).strip().splitlines() or [""])[0].split(". ")[0]
    plain = isinstance(error, (OSError, ValueError, ImportError))
    return text if plain else f"{type(error).__name__}: {text}"


def print_compute_type(device, dtype):
    name, why = torch.cuda.get_device_name(device), "as requested"
    if dtype == (torch.bfloat16 if has_bf16() else torch.float16):
        major, minor = torch.cuda.get_device_capability(device)
        why = f"compute capability {major}.{minor}, bf16 needs 8.0"
    print(f"computing in {str(dtype).removeprefix('torch.')} on {name} ({why})")


def hub_answers(name):
    """Whether the hub can be reached. On its own, transformers retries for half a minute."""
    try:
        get_hf_file_metadata(hf_hub_url(name, "config.json"), timeout=2)
    except Exception as error:  # a response such as 404 counts as an answer
        return type(error).__name__ not in ("ConnectError", "ConnectTimeout", "ConnectionError")
    return True


def load_parts(name, load_in_4bit, device, dtype, options):
    """Returns the same as `load_pretrained`. Raises: InputError, and the libraries' exceptions."""
    config = AutoConfig.from_pretrained(name, **options)
    if config.model_type not in SUPPORTED:
        supported = " and ".join(SUPPORTED)
        raise InputError(f"{name} has type {config.model_type}; supported: {supported}")
    tokenizer = load_tokenizer(name, config, options)
    processor = AutoImageProcessor.from_pretrained(name, backend="pil", **options)
    vision = config.vision_config
    cells = vision.patch_size, vision.spatial_merge_size
    if (processor.patch_size, processor.merge_size) != cells:
        reason = "preprocessor_config.json and config.json differ in patch_size or merge_size"
        raise InputError(f"{name}: {reason}; download it again")
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=[".*visual", "lm_head"],
    )
    model, report = AutoModelForImageTextToText.from_pretrained(
        name,
        dtype=dtype,
        quantization_config=quantization if load_in_4bit else None,
        use_safetensors=True,  # never a pickle
        attn_implementation="sayo",
        device_map={"": device},
        output_loading_info=True,
        **options,
    )
    if missing := sorted(report["missing_keys"]):  # transformers would leave them random
        count = f"{len(missing)} tensors, including {missing[0]}"
        raise InputError(f"the weights in {name} lack {count}: download it again")
    for module in model.modules():
        # On some CPUs bitsandbytes repacks frozen weights in bf16 when they are first used without
        # gradient. Sampling and training would then use different weights.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model, tokenizer, processor


def load_tokenizer(name, config, options):
    """The tokenizer with its chat template. Raises: InputError."""
    tokenizer = AutoTokenizer.from_pretrained(name, **options)
    if tokenizer.chat_template is None:  # some checkpoints store it where only processors look
        found = {k: v for k, v in options.items() if k == "local_files_only"}
        found["_raise_exceptions_for_missing_entries"] = False
        path = cached_file(name, "chat_template.json", **found)
        if path is None:
            raise InputError(f"{name} has no chat template: use an Instruct model")
        tokenizer.chat_template = json.loads(Path(path).read_text("utf-8"))["chat_template"]
    if not tokenizer.convert_ids_to_tokens(config.image_token_id):
        raise InputError(
            f"{name} has no tokenizer, or that of a different model: download it again"
        )
    try:
        tokenizer.apply_chat_template([{"role": "user", "content": ""}], tokenize=False)
    except Exception as error:  # the template is a program and can raise anything
        problem = f"{name}: its chat template is damaged ({first_line(error)})"
        raise InputError(f"{problem}: download it again") from None
    return tokenizer


def add_lora(model, r, alpha):
    """The PEFT model: LoRA on the language model's linear layers, everything else frozen."""
    model.requires_grad_(False)
    lora = LoraConfig(r=r, lora_alpha=alpha, target_modules=LORA_TARGETS)
    with warnings.catch_warnings():  # PEFT 0.21 uses a deprecated name of transformers 5.24
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
        try:
            return get_peft_model(model, lora)
        except ImportError as error:  # PEFT checks versions of packages that it does not need
            raise import_problem(error) from None


def adapter_settings(folder, given):
    """A saved adapter's settings, a dict of lora_r and lora_alpha. Raises: InputError if it cannot
    be read, or if `given`, a dict of flags, contradicts it."""
    path = Path(folder) / "adapter_config.json"
    try:
        saved = json.loads(path.read_text("utf-8"))
        settings = {"lora_r": int(saved["r"]), "lora_alpha": int(saved["lora_alpha"])}
        variant = next((name for name in LORA_VARIANTS if saved.get(name)), None)
    except OSError as error:
        raise InputError(f"no adapter in {folder}: {path.name}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is damaged ({error!r}): save the adapter again") from None
    if variant:
        raise InputError(f"{path} has {variant}: only plain LoRA can be loaded")
    for name, value in settings.items():
        if given.get(name, value) != value:
            advice = "leave the flag out"
            raise InputError(
                f"--{name} {given[name]}: the adapter in {folder} has {value}; {advice}"
            )
    return settings


def load_adapter(model, folder):
    """Load an adapter's weights into a PEFT model. Raises: InputError if they do not fit; the model
    is unchanged then."""
    lora = model.peft_config[model.active_adapter]
    adapter_settings(folder, {"lora_r": lora.r, "lora_alpha": lora.lora_alpha})
    try:
        weights = load_file(Path(folder) / "adapter_model.safetensors")
    except (OSError, SafetensorError) as error:
        raise InputError(f"no adapter in {folder}: {error}") from None
    expected = get_peft_model_state_dict(model)
    common = expected.keys() & weights.keys()
    problems = {
        "does not match this model: unexpected key": weights.keys() - expected.keys(),
        "does not match this model: missing key": expected.keys() - weights.keys(),
        "does not match this model: wrong shape in": {
            k for k in common if weights[k].shape != expected[k].shape
        },
        "is damaged: NaN or infinity in": {k for k in common if not weights[k].isfinite().all()},
    }
    for problem, names in problems.items():
        if names:
            raise InputError(f"the adapter in {folder} {problem} {min(names)}")
    set_peft_model_state_dict(model, weights)


def resolve_indices(what, indices, count):
    """Sorted, non-negative indices; all `count` of them if `indices` is None.
    Raises: InputError if one is out of range."""
    for i in indices or ():
        if not -count <= i < count:
            last = f"{what}s 0 to {count - 1}, or -1 for the last"
            raise InputError(f"no {what} {i}: the model has {last}")
    return sorted({i % count for i in indices}) if indices else list(range(count))
