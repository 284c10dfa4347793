"""`look`: ask one question about one image, and draw where the model looks while it answers."""

from pathlib import Path

from PIL import Image

import reward
from analysis.evaluate import decode_tokens, trace_attention
from analysis.plots import plot_answers
from commands.parser import build_config, load_saved
from config import InputError
from data import Example, encode_example, example_region
from sources.images import apply_exif_orientation, image_errors


def run_look(given, load_model):
    """Answer the question, print the answer and its scores, and write the picture. With an adapter,
    before and after training, with the settings of the run that trained it.

    Args: given, the flags from the command line: `image`, `question`, `output`, and optionally
    `box`, `adapter` and the fields of Config; load_model, a function of Config that returns a Vlm.
    Returns: the exit code. Raises: InputError.
    """
    settings = dict(given)
    image, question, output = (settings.pop(name) for name in ("image", "question", "output"))
    box, adapter = settings.pop("box", ""), settings.pop("adapter", "")
    run_folder = Path(adapter).parent
    has_settings = adapter and (run_folder / "config.json").exists()
    cfg = build_config(settings, load_saved(run_folder) if has_settings else None)
    example = read_example(image, question, parse_box(box))
    vlm = load_model(cfg)
    answers = [describe_answer(vlm, example, cfg, "before training" if adapter else "")]
    if adapter:
        vlm.load_adapter(adapter)
        answers.append(describe_answer(vlm, example, cfg, "after training"))
    try:
        plot_answers(example.image, example.boxes, answers, output)
    except (OSError, ValueError) as error:
        raise InputError(f"--output {output}: {error}") from None
    print(f"the picture: {output}")
    return 0


def parse_box(text):
    """[(x1, y1, x2, y2)] from "x1,y1,x2,y2"; [] from "". Raises: InputError."""
    if not text:
        return []
    try:
        x1, y1, x2, y2 = (float(number) for number in text.split(","))
    except ValueError:
        raise InputError(f"--box {text}: give four numbers, x1,y1,x2,y2") from None
    return [(x1, y1, x2, y2)]


def read_example(path, question, boxes):
    """The Example of an image file. Raises: InputError if the image cannot be read."""
    with image_errors(path), Image.open(path) as stored:
        image, boxes = apply_exif_orientation(stored, boxes)
    return Example(image, question, "", boxes, f"--image {path}")


def describe_answer(vlm, example, cfg, caption):
    """Answer greedily; print the answer, and its scores if the example has a box.
    Returns: a dict for `plot_answers`."""
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
    return {
        "caption": caption,
        "map": trace.map.tolist(),
        "grid": prompt.grid,
        "tokens": decode_tokens(vlm, trace.completion),
        "entropy": trace.entropy.tolist(),
        "selected": trace.selected.tolist(),
    }
