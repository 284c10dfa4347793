"""What a person looks at after a run: attention over the image, cell by cell, and a table of before and after."""

import math
import textwrap
from statistics import fmean as mean
from statistics import stdev

from PIL import Image, ImageDraw, ImageFont, ImageOps


def overlay(image, attention, grid, boxes=(), size=336):
    """`image` under a map of attention, its longer side `size` pixels.

    Args: attention (N,), one number a cell of `grid` = (rows, cols), scaled here so that the largest is brightest;
    boxes in pixels of `image`, outlined in white. Cells keep their edges: the model sees no finer than that. A cell
    without attention shows the bare image.
    """
    scale = size / max(image.size)
    width, height = (max(1, round(v * scale)) for v in image.size)
    picture = image.convert("RGB").resize((width, height))
    rows, cols = grid
    strength = Image.new("L", (cols, rows))
    top = max(max(attention), 1e-12)
    strength.putdata([round(255 * max(0.0, a / top) ** 0.5) for a in attention])  # the root lets faint ones be seen
    strength = strength.resize((width, height), Image.Resampling.NEAREST)
    # from black over red to yellow, evenly lighter: more attention is brighter in grey as well
    color = ImageOps.colorize(strength, "#000004", "#fcffa4", mid="#dd513a")
    picture.paste(color, (0, 0), strength.point(lambda v: 0.75 * v))
    pen = ImageDraw.Draw(picture)
    for x1, y1, x2, y2 in boxes:
        frame = [v * scale for v in (x1, y1, x2, y2)]
        pen.rectangle(frame, outline="black", width=5)
        pen.rectangle(frame, outline="white", width=3)
    return picture


def before_after(examples, before, after, path):
    """Write one picture: a row for each example that has a map, the plain image | attention before | after.

    Args: before, after, the results of `evaluate` (of which `map`, `grid`, `text` and `correct` are used); path, a PNG.
    """
    size, gap, text = 336, 12, 54
    rows = [i for i, result in enumerate(before) if result["map"]]
    sheet = Image.new("RGB", (3 * size + 4 * gap, gap + len(rows) * (size + gap + text)), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=14)
    for r, i in enumerate(rows):
        example, grid, y = examples[i], before[i]["grid"], gap + r * (size + gap + text)
        columns = [([0] * len(before[i]["map"]), example.question)]
        for name, side in (("before", before[i]), ("after", after[i])):
            columns.append((side["map"], f"{name}, {'right' if side['correct'] else 'wrong'}: {side['text']}"))
        for c, (attention, caption) in enumerate(columns):
            picture, x = overlay(example.image, attention, grid, example.boxes, size), gap + c * (size + gap)
            sheet.paste(picture, (x, y))
            lines = textwrap.wrap(caption, 46)[:3]
            pen.multiline_text((x, y + picture.height + 3), "\n".join(lines), fill="black", font=font, spacing=2)
    sheet.save(path)


def table(before, after):
    """The before/after table, with 95 % intervals (Wilson's for shares, normal for means) and chance."""
    lines = [
        ("greedy accuracy", "correct", ""),
        ("attention on the region, AUROC", "auroc", "0.500"),
        ("  held against another's box", "permuted_auroc", "0.500"),
        ("  mass / area", "mass_over_area", "1.000"),
        ("  pointing game", "pointing", f"{mean([r['area'] for r in before]):.3f}"),
        ("  TAS", "tas", "0.500"),
        ("the same on fixed text, AUROC", "fixed_auroc", "0.500"),
        ("  mass / area", "fixed_mass_over_area", "1.000"),
        ("attention to the whole image", "image_mass", ""),
        ("tokens of an answer", "length", ""),
    ]
    out = [f"{'held-out examples: ' + str(len(before)):32}{'before':>25}{'after':>25}{'chance':>8}"]
    for title, key, chance in lines:
        cells = [interval([r[key] for r in rows], share=key == "correct") for rows in (before, after)]
        out.append(f"{title:32}{cells[0]:>25}{cells[1]:>25}{chance:>8}")
    return "\n".join(out)


ALARMS = {  # metric -> (from which value on it is suspect, why)
    "frac_reward_zero_std": (0.9, "the answers to a question all earn the same: there is nothing to learn from"),
    "completions/seq_rep_3": (0.3, "answers say the same words over and over"),
    "completions/unclosed_tags": (0.3, "answers open <answer> and do not close it"),
    "completions/clipped_ratio": (0.5, "most answers are cut off at --max_completion_length"),
}


def alarms(row):
    """What a row of metrics.jsonl warns of: known ways to earn reward without doing what was meant, or to earn none."""
    return [f"{name} {row[name]:.2f}: {why}" for name, (least, why) in ALARMS.items() if row[name] >= least]


def interval(values, share=False):
    """The mean and its 95 % interval, as in 0.523 [0.461, 0.584]."""
    values = [v for v in values if not math.isnan(v)]
    if len(values) < 2:
        return "-"
    n, m, z = len(values), mean(values), 1.96
    if share:  # Wilson: right also near 0 and 1, where the normal interval would leave [0, 1]
        center = (m + z * z / (2 * n)) / (1 + z * z / n)
        half = z * math.sqrt(m * (1 - m) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    else:
        center, half = m, z * stdev(values) / math.sqrt(n)
    return f"{m:.3f} [{center - half:.3f}, {center + half:.3f}]"
