"""`look`: ask a question about an image, and draw where the model looks while it answers."""

from pathlib import Path

from PIL import Image

import reward
from checkpoint import load_settings
from config import InputError, build_config
from data import Example, encode_example, example_region, warn_tiny
from evaluate import tokens_before_answer, trace_attention, written_words
from extras.pictures import draw_row, plot_animation
from json_lines import (
    TURNED,
    apply_exif_orientation,
    check_boxes,
    clean_text,
    clip_box,
    exif_orientation,
    image_errors,
    open_image,
    stored_size,
)
from model import adapter_settings, load_model


def run_look(given):
    """Answer a question greedily, print the answer and its scores, and draw the attention. With an
    adapter, answer both without and with it, using the settings of the run that trained it. An
    output that ends in .gif is an animation.

    Args: given, a dict of flags: `image`, `question`, `output`, and optionally `box` (a list),
    `adapter` and fields of Config.
    Returns: the exit code. Raises: InputError, if possible before loading the model.
    """
    settings = dict(given)
    image, question, output = (settings.pop(name) for name in ("image", "question", "output"))
    boxes, adapter = settings.pop("box", []), settings.pop("adapter", "")
    check_output(output)
    example = read_example(image, question, [parse_box(box) for box in boxes])
    saved = None
    if adapter:
        settings |= adapter_settings(adapter, settings)
        run = Path(adapter).parent
        saved = load_settings(run) if (run / "config.json").exists() else None
    cfg = build_config(settings, saved)
    warn_tiny(cfg, [example.image.size])
    vlm = load_model(cfg)
    answers = [describe_answer(vlm, example, cfg, "before training" if adapter else "answer")]
    if adapter:
        vlm.load_adapter(adapter)
        answers.append(describe_answer(vlm, example, cfg, "after training"))
    if Path(output).suffix.lower() == ".gif":
        plot_animation(example, answers, output)
    else:
        draw_row(example, answers).save(output)
    print(f"wrote {output}")
    return 0


def check_output(output):
    """Raises: InputError unless `output` is the name of an image file."""
    path = Path(output)
    if Image.registered_extensions().get(path.suffix.lower()) not in Image.SAVE:
        raise InputError(f"--output {output}: must end in .png, .gif or a similar extension")


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
    try:
        question = clean_text("question", question)
    except ValueError as error:
        raise InputError(f"--question: {error}") from None
    with image_errors(path), open_image(path) as stored:
        size, turned = stored_size(stored), exif_orientation(stored) in TURNED
        image, shown = apply_exif_orientation(stored, [clip_box(box, size) for box in boxes])
    if boxes:
        try:
            check_boxes(boxes, size, turned=turned)
        except ValueError as error:
            raise InputError(f"--box: {error}") from None
    return Example(image, question, "", shown, f"--image {path}")


def describe_answer(vlm, example, cfg, caption):
    """Answer greedily and print the answer, with scores if the example has a box.
    Returns: a dict for `draw_row` and `plot_animation`."""
    prompt = encode_example(vlm, example, cfg)
    trace = trace_attention(vlm, prompt, cfg)
    print(f"{caption}: {trace.completion.texts[0]}")
    if example.boxes:
        region = example_region(example, prompt.grid)
        attention, selected = trace.attention[None], trace.selected[None]
        r_v = reward.attention_reward(attention, region, selected).item()
        scores = reward.localization(trace.map, region)
        auroc, ratio = scores["auroc"], scores["mass_over_area"]
        print(f"  r_v {r_v:.3f}, AUROC {auroc:.3f}, mass / area {ratio:.2f}")
        before_answer = tokens_before_answer(written_words(vlm, trace.completion))
        looks = reward.early_and_late(trace.attention, region, before_answer)
        first, last = ("on" if look else "off" for look in looks)
        print(f"  first look: {first} the region; last look: {last}")
    return {
        "caption": caption,
        "words": written_words(vlm, trace.completion),
        "maps": trace.attention.tolist(),
        "grid": prompt.grid,
        "selected": trace.selected.tolist(),
    }
