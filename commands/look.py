"""`look`: ask a question about an image and draw where the model looks while it answers."""

import os
import re
from pathlib import Path

from PIL import Image
from safetensors import SafetensorError, safe_open

import reward
from analysis.animation import plot_animation
from analysis.evaluate import decode_tokens, trace_attention, written_words
from analysis.plots import plot_answers
from config import InputError, is_tiny
from data import Example, encode_example, example_region
from runtime.parser import build_config
from runtime.settings import load_saved
from sources.dataset import region_errors, text_errors
from sources.images import apply_exif_orientation, clip_box, image_errors, stored_size
from sources.pretrained import adapter_settings
from sources.scenes import Scenes


def run_look(given, load_model):
    """Answer the question, print the answer and its scores, and draw the attention. With an
    adapter, answer both without and with it, using the settings of the run that trained it. If the
    output ends in .gif, it is an animation.

    Args: given, a dict of flags: `image`, `question`, `output`, and optionally `box` (a list),
    `adapter` and fields of Config; load_model, a function from Config to Vlm.
    Returns: the exit code. Raises: InputError, if possible before loading the model.
    """
    settings = dict(given)
    image, question, output = (settings.pop(name) for name in ("image", "question", "output"))
    boxes, adapter = settings.pop("box", []), settings.pop("adapter", "")
    check_output(output)
    example = read_example(image, question, [parse_box(box) for box in boxes])
    saved = None
    if adapter:
        check_adapter(adapter)
        settings |= adapter_settings(adapter, settings)
        saved = load_saved(Path(adapter).parent)
    cfg = build_config(settings, saved)
    vlm = load_model(cfg)
    if is_tiny(cfg.model_name_or_path):
        warn_of_unknown(vlm, example)
    answers = [describe_answer(vlm, example, cfg, "before training" if adapter else "")]
    if adapter:
        vlm.load_adapter(adapter)
        answers.append(describe_answer(vlm, example, cfg, "after training"))
    try:
        if Path(output).suffix.lower() == ".gif":
            plot_animation(example, answers, output)
        else:
            plot_answers(example.image, example.boxes, answers, output)
    except (OSError, ValueError) as error:
        raise InputError(f"--output {output}: {error}") from None
    print(f"wrote {output}")
    return 0


def check_output(output):
    """Raises: InputError if no image can be written to `output`."""
    path, formats = Path(output), Image.registered_extensions()
    if formats.get(path.suffix.lower()) not in Image.SAVE:
        raise InputError(f"--output {output}: must end in .png, .gif or a similar extension")
    target = path if path.exists() else path.parent
    if path.is_dir() or not target.exists():
        problem = "is a folder" if path.is_dir() else f"the folder {path.parent} does not exist"
        raise InputError(f"--output {output}: {problem}")
    if not os.access(target, os.W_OK):
        raise InputError(f"--output {output}: {target} is not writable")


def check_adapter(folder):
    """Raises: InputError if there is no adapter. Loading it checks whether it fits."""
    try:
        with safe_open(Path(folder) / "adapter_model.safetensors", "pt") as weights:
            weights.keys()
    except (OSError, SafetensorError) as error:
        raise InputError(f"--adapter {folder}: no adapter in this folder ({error})") from None


def parse_box(text):
    """[x1, y1, x2, y2] from "x1,y1,x2,y2". Raises: InputError."""
    try:
        x1, y1, x2, y2 = (float(number) for number in text.split(","))
    except ValueError:
        raise InputError(f"--box {text}: expected four numbers, x1,y1,x2,y2") from None
    return [x1, y1, x2, y2]


def read_example(path, question, boxes):
    """The Example for an image file. Raises: InputError if the image cannot be read, the question
    is unusable, or a box is not on the image."""
    for error in text_errors("question", question):
        raise InputError(f"--question: {error}")
    with image_errors(path), Image.open(path) as stored:
        size = stored_size(stored)
        errors = list(region_errors(boxes or [[0, 0, *size]], size))
        if not errors:
            boxes = [clip_box(box, size) for box in boxes]
            image, boxes = apply_exif_orientation(stored, boxes)
    for error in errors:
        raise InputError(f"--box: {error}" if boxes else f"--image {path}: {error}")
    return Example(image, question, "", boxes, f"--image {path}")


def warn_of_unknown(vlm, example):
    """Print a warning if the tiny model gets an image or a word that it does not know."""
    tokenizer, side = vlm.tokenizer, Scenes.image_size
    words = re.findall(r"\w+|[^\w\s]", example.question)
    unknown = [word for word in words if tokenizer.unk_token_id in tokenizer(word).input_ids]
    found = [f"the image is {example.image.width} x {example.image.height}"]
    found = found * (example.image.size != (side, side)) + [f"no word {w!r}" for w in unknown[:1]]
    if found:
        print(
            f"the tiny model only knows {side} x {side} images of cards and a few words, as in "
            f"example/ ({', '.join(found)}): for anything else, use --model_name_or_path"
        )


def describe_answer(vlm, example, cfg, caption):
    """Answer greedily and print the answer, with scores if the example has a box.
    Returns: a dict for `plot_answers` and `plot_animation`."""
    prompt = encode_example(vlm, example, cfg)
    region = example_region(example, prompt.grid) if example.boxes else None
    trace = trace_attention(vlm, prompt, cfg)
    print(f"{caption or 'answer'}: {trace.completion.texts[0]}")
    if region is not None:
        attention, selected = trace.attention[None], trace.selected[None]
        r_v = reward.attention_reward(attention, region, selected).item()
        scores = reward.localization(trace.map, region)
        auroc, ratio = scores["auroc"], scores["mass_over_area"]
        print(f"  r_v {r_v:.3f}, AUROC {auroc:.3f}, mass / area {ratio:.2f}")
        looks = reward.early_and_late(trace.attention, region, trace.selected)
        early, late = ("on" if look else "off" for look in looks)
        print(f"  early look: {early} the region; late look: {late}")
    return {
        "caption": caption,
        "map": trace.map.tolist(),
        "grid": prompt.grid,
        "tokens": decode_tokens(vlm, trace.completion),
        "words": written_words(vlm, trace.completion),
        "maps": trace.attention.tolist(),
        "entropy": trace.entropy.tolist(),
        "selected": trace.selected.tolist(),
    }
