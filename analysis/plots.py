"""Plots of attention: over an image, before and after training, and per layer and head."""

import textwrap

from PIL import Image, ImageDraw, ImageFont, ImageOps

# Low, high, middle. Lightness increases steadily, so the map also works in grayscale.
COLOR_MAP = "#000004", "#fcffa4", "#dd513a"


def overlay(image, attention, grid, boxes=(), size=336):
    """Draw an attention map over an image.

    Args: attention (N,), a number per cell of `grid` = (rows, cols); the largest is brightest;
    boxes, in pixels of `image`, outlined in white; size, the longer side of the result in pixels.
    Returns: an RGB image with hard cell edges, one cell per image token. Cells without attention
    show the plain image.
    """
    scale = size / max(image.size)
    width, height = (max(1, round(v * scale)) for v in image.size)
    picture = image.convert("RGB").resize((width, height))
    rows, cols = grid
    strength = Image.new("L", (cols, rows))
    largest = max(max(attention), 1e-12)
    # The square root makes weak attention visible.
    strength.putdata([round(255 * max(0.0, a / largest) ** 0.5) for a in attention])
    strength = strength.resize((width, height), Image.Resampling.NEAREST)
    color = ImageOps.colorize(strength, *COLOR_MAP)
    picture.paste(color, (0, 0), strength.point(lambda v: 0.75 * v))
    draw = ImageDraw.Draw(picture)
    for box in boxes:
        outline = [v * scale for v in box]
        draw.rectangle(outline, outline="black", width=5)
        draw.rectangle(outline, outline="white", width=3)
    return picture


def plot_before_after(examples, before, after, path):
    """Write an image with one row per example that has a map: the plain image, attention before
    training, attention after it.

    Args: before, after, results of `evaluate` with `map`, `grid`, `text` and `correct`; path, the
    output file.
    """
    size, gap, caption_height = 336, 12, 54
    row_height = size + gap + caption_height
    shown = [i for i, result in enumerate(before) if result["map"]]
    sheet = Image.new("RGB", (3 * size + 4 * gap, gap + len(shown) * row_height), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=14)
    for row, i in enumerate(shown):
        example, grid, y = examples[i], before[i]["grid"], gap + row * row_height
        columns = [([0] * len(before[i]["map"]), example.question)]
        for name, result in (("before", before[i]), ("after", after[i])):
            verdict = "right" if result["correct"] else "wrong"
            columns.append((result["map"], f"{name}, {verdict}: {result['text']}"))
        for column, (attention, caption) in enumerate(columns):
            picture = overlay(example.image, attention, grid, example.boxes, size)
            x = gap + column * (size + gap)
            sheet.paste(picture, (x, y))
            text = "\n".join(textwrap.wrap(caption, 46)[:3])
            draw.multiline_text((x, y + picture.height + 3), text, "black", font, spacing=2)
    sheet.save(path)


def plot_answers(image, boxes, answers, path):
    """Write the image of the `look` command: one column per answer.

    A column shows the mean attention of the selected tokens over the image. Below it are all
    tokens: bluer means higher entropy, and selected tokens are underlined.

    Args: answers, dicts with `caption`, `map` (N,), `grid`, `tokens` (C strings), `entropy` (C,)
    in nats and `selected` (C,); path, the output file.
    """
    size, gap = 448, 16
    sheet = Image.new("RGB", (len(answers) * (size + gap) + gap, 4 * size), "white")
    bottom = 0
    for n, answer in enumerate(answers):
        left = gap + n * (size + gap)
        bottom = max(bottom, draw_answer(sheet, left, gap, size, image, boxes, answer) + gap)
    sheet.crop((0, 0, sheet.width, min(bottom, sheet.height))).save(path)


def draw_answer(sheet, left, top, size, image, boxes, answer):
    """Draw a column of `plot_answers`, `size` pixels wide. Returns: the y of its bottom."""
    draw, font, line = ImageDraw.Draw(sheet), ImageFont.load_default(size=15), 22
    draw.text((left, top), answer["caption"], "black", font)
    picture = overlay(image, answer["map"], answer["grid"], boxes, size)
    sheet.paste(picture, (left, top + line))
    y = top + line + picture.height + 8
    gradient = Image.linear_gradient("L").rotate(90).resize((120, 10))
    sheet.paste(ImageOps.colorize(gradient, *COLOR_MAP), (left, y + 4))
    largest = 100 * max(answer["map"])
    legend = f"0 to {largest:.2g} % of the attention per cell"
    draw.text((left + 128, y - 1), legend, "black", font)
    x, y = left, y + line + 8
    for token, entropy, selected in zip(answer["tokens"], answer["entropy"], answer["selected"]):
        token = token.strip() or " "
        width = draw.textlength(token, font) + 6
        if x + width > left + size:
            x, y = left, y + line + 4
        shade = round(255 * (1 - min(0.6, entropy / 2)))
        draw.rectangle((x, y, x + width, y + line - 2), (shade, shade, 255))
        draw.text((x + 3, y), token, "black", font)
        if selected:
            draw.line((x, y + line, x + width, y + line), "black", 2)
        x += width + 4
    return y + line


def plot_heatmap(auroc, path):
    """Write a table of AUROCs as a heat map. Chance (0.5) and below is black.

    Args: auroc (L + 1, H + 1), a row per layer and a column per head; the last row and column are
    for the mean over all; path, the output file.
    """
    rows, cols, width, height, left, top = len(auroc), len(auroc[0]), 52, 24, 70, 24
    above_chance = [max(0.0, value - 0.5) for row in auroc for value in row]
    blank = Image.new("RGB", (cols * width, rows * height))
    cells = overlay(blank, above_chance, (rows, cols), size=max(blank.size))
    sheet = Image.new("RGB", (left + cells.width, top + cells.height), "white")
    sheet.paste(cells, (left, top))
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=13)
    for j, name in enumerate(["head 0", *map(str, range(1, cols - 1)), "all"]):
        draw.text((left + width * (j + 0.5), top / 2), name, "black", font, anchor="mm")
    for i, row in enumerate(auroc):
        y = top + height * (i + 0.5)
        name = f"layer {i}" if i < rows - 1 else "all"
        draw.text((left - 6, y), name, "black", font, anchor="rm")
        for j, value in enumerate(row):
            position = left + width * (j + 0.5), y
            outline = dict(stroke_width=1, stroke_fill="black")
            draw.text(position, f"{value:.2f}", "white", font, anchor="mm", **outline)
    sheet.save(path)
