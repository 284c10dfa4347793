"""What a person looks at after a run: attention over the image, cell by cell, and a table of before and after."""

import math
import textwrap
from statistics import fmean as mean
from statistics import stdev

from PIL import Image, ImageDraw, ImageFont, ImageOps

RAMP = "#000004", "#fcffa4", "#dd513a"  # black, yellow, red between: evenly lighter, so it reads in grey as well


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
    color = ImageOps.colorize(strength, *RAMP)
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


def answer_sheet(image, boxes, sides, path):
    """Write the picture of `sayo_mini.py look`: for each answer the image under the mean attention of its chosen
    tokens; below it every token on a ground that is darker the less sure the model was, the chosen ones underlined.

    Args: sides, dicts with `caption`, `map` (N,), `grid`, `words`, `entropy` (C,), `selected` (C,).
    """
    size, gap, line, font = 448, 16, 22, ImageFont.load_default(size=15)
    sheet = Image.new("RGB", (len(sides) * (size + gap) + gap, 4 * size), "white")
    pen, end = ImageDraw.Draw(sheet), 0
    for n, side in enumerate(sides):
        left, y = gap + n * (size + gap), gap
        pen.text((left, y), side["caption"], fill="black", font=font)
        picture = overlay(image, side["map"], side["grid"], boxes, size)
        sheet.paste(picture, (left, y + line))
        y += line + picture.height + 8
        ramp = ImageOps.colorize(Image.linear_gradient("L").rotate(90).resize((120, 10)), *RAMP)
        sheet.paste(ramp, (left, y + 4))
        share = 100 * max(side["map"])
        pen.text((left + 128, y - 1), f"0 to {share:.2g} % of the attention, on one cell", fill="black", font=font)
        x, y = left, y + line + 8
        for word, doubt, chosen in zip(side["words"], side["entropy"], side["selected"]):
            word = word.strip() or " "
            width = pen.textlength(word, font) + 6
            if x + width > left + size:
                x, y = left, y + line + 4
            shade = round(255 * (1 - min(0.6, doubt / 2)))
            pen.rectangle((x, y, x + width, y + line - 2), fill=(shade, shade, 255))
            pen.text((x + 3, y), word, fill="black", font=font)
            if chosen:
                pen.line((x, y + line, x + width, y + line), fill="black", width=2)
            x += width + 4
        end = max(end, y + line + gap)
    sheet.crop((0, 0, sheet.width, min(end, sheet.height))).save(path)


def heat_table(values, path):
    """Write a table of AUROC as a heat map, chance black: a row a layer, a column a head, the last for all together.
    Args: values (L + 1, H + 1)."""
    rows, cols, width, height, left = len(values), len(values[0]), 52, 24, 70
    above_chance = [max(0.0, value - 0.5) for row in values for value in row]
    blank = Image.new("RGB", (cols * width, rows * height))
    heat = overlay(blank, above_chance, (rows, cols), size=max(blank.size))
    sheet, font = Image.new("RGB", (left + heat.width, 24 + heat.height), "white"), ImageFont.load_default(size=13)
    sheet.paste(heat, (left, 24))
    pen = ImageDraw.Draw(sheet)
    for j, name in enumerate(["head 0", *map(str, range(1, cols - 1)), "all"]):
        pen.text((left + width * (j + 0.5), 12), name, fill="black", font=font, anchor="mm")
    for i, row in enumerate(values):
        y = 24 + height * (i + 0.5)
        pen.text((left - 6, y), f"layer {i}" if i < rows - 1 else "all", fill="black", font=font, anchor="rm")
        for j, value in enumerate(row):
            where = left + width * (j + 0.5), y
            pen.text(where, f"{value:.2f}", "white", font, anchor="mm", stroke_width=1, stroke_fill="black")
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
