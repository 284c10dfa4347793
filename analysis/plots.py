"""Plots of attention: over an image, before and after training, and per layer and head."""

from bisect import bisect_right
from functools import cache

from PIL import Image, ImageChops, ImageDraw, ImageFont

from analysis.html_report import INFERNO

BOX_COLORS = "white", "#00d5ff"  # outer and inner line; inferno has no cyan
RIGHT, WRONG, NEUTRAL = "#00765a", "#b34700", "#444444"  # green and red that color-blind people see
DARKEN = 0.4  # brightness of the image under a map
COLOR_BAR_WIDTH = 80  # pixels, labels included


def color_table():
    """The color map as a palette for Pillow: 256 RGB triples in one list."""
    points, table = [bytes.fromhex(point) for point in INFERNO.split()], []
    for level in range(256):
        i, part = divmod(level * (len(points) - 1), 255)
        low, high = points[i], points[min(i + 1, len(points) - 1)]
        table += [round(a + (b - a) * part / 255) for a, b in zip(low, high)]
    return table


COLOR_TABLE = color_table()


@cache
def load_font(size):
    return ImageFont.load_default(size=size)


# --- pictures ---


def fit(image, size):
    """The image as RGB, scaled to fit into `size` = (width, height)."""
    scale = min(limit / side for limit, side in zip(size, image.size))
    return image.convert("RGB").resize([max(1, int(scale * side + 1e-6)) for side in image.size])


def draw_boxes(picture, boxes, image_size):
    """Outline boxes on a picture, in place, just outside their edges. Args: boxes, in pixels of the
    original image; image_size, its (width, height)."""
    draw, scales = ImageDraw.Draw(picture), [a / b for a, b in zip(picture.size, image_size)]
    for box in boxes:
        for inset, width, color in ((0, 2, BOX_COLORS[0]), (2, 3, BOX_COLORS[1])):
            corners = []
            for low, high, scale, side in zip(box[:2], box[2:], scales, picture.size):
                # A box that reaches the edge of the image must stay visible.
                end = min(round(high * scale) + 4, side - 1) - inset
                corners.append((min(max(0, round(low * scale) - 5) + inset, end), end))
            (x1, x2), (y1, y2) = corners
            draw.rectangle((x1, y1, x2, y2), outline=color, width=width)


def show_boxes(image, boxes, size):
    """The image with its boxes, scaled to fit into `size` = (width, height)."""
    picture = fit(image, size)
    draw_boxes(picture, boxes, image.size)
    return picture


def heat(attention, grid, size, highest=None):
    """An attention map in colors. Args: attention (N,), a number per cell of `grid` = (rows, cols);
    size, (width, height) in pixels; highest, the attention with the brightest color, by default the
    largest. The scale is linear, as in the reward. Returns: an RGB image with hard cell edges."""
    highest = max(max(attention) if highest is None else highest, 1e-12)
    rows, cols = grid
    levels = Image.new("L", (cols, rows))
    levels.putdata([round(255 * min(1.0, max(0.0, a / highest))) for a in attention])
    levels = levels.resize(size, Image.Resampling.NEAREST)
    levels.putpalette(COLOR_TABLE)
    return levels.convert("RGB")


def overlay(image, attention, grid, boxes=(), size=(336, 336), highest=None):
    """Draw an attention map over an image, which becomes gray and dark.

    The map is added like light, so a cell is never darker than the image and more attention is
    always brighter. Args: see `heat`; boxes, in pixels of `image`; size, (width, height) to fit
    into. Returns: RGB, one hard-edged cell per image token.
    """
    picture = fit(image, size)
    dark = picture.convert("L").point(lambda v: DARKEN * v).convert("RGB")
    picture = ImageChops.screen(dark, heat(attention, grid, picture.size, highest))
    draw_boxes(picture, boxes, image.size)
    return picture


def draw_color_bar(sheet, left, top, height, highest, clipped=False):
    """Draw the colors of `overlay` on a gray image, and the attention per cell that they stand for.
    Args: highest, see `heat`; clipped, whether a cell may have more."""
    draw, font, width, steps = ImageDraw.Draw(sheet), load_font(15), 16, 64
    values = [highest * (1 - i / (steps - 1)) for i in range(steps)]
    gray = Image.new("RGB", (width, height), "gray")
    sheet.paste(overlay(gray, values, (steps, 1), size=gray.size), (left, top))
    for part, anchor in ((0, "la"), (0.5, "lm"), (1, "ls")):
        text = percent(highest * (1 - part)) + ("\nor more" if clipped and not part else "")
        draw.text((left + width + 5, top + part * height), text, "black", font, anchor=anchor)


def percent(share):
    """A share as text, in percent, with two significant digits."""
    return f"{100 * share:.0f} %" if share >= 0.1 or share == 0 else f"{100 * share:.2g} %"


# --- text ---


def shorten(text, font, width):
    """The text, cut to `width` pixels and marked with three dots if it is longer."""
    if font.getlength(text) <= width:
        return text
    lengths = range(len(text) + 1)
    kept = bisect_right(lengths, width, key=lambda n: font.getlength(f"{text[:n]}...")) - 1
    return f"{text[: max(0, kept)].rstrip()}..."


def lay_out(words, font, width):
    """Place the pieces of a text on lines of `width` pixels.

    Args: words, strings that form the text when joined. Returns: (line, x, word) per piece, without
    the whitespace around it. A piece that follows without whitespace can also start a line.
    """
    placed, line, x, space = [], 0, 0.0, False
    for word in words:
        space = space or word[:1].isspace()
        text = shorten(" ".join(word.split()), font, width)
        left = x + (font.getlength(" ") if space and x else 0)
        if text:
            if x and left + font.getlength(text) > width:
                line, left = line + 1, 0.0
            x, space = left + font.getlength(text), word[-1:].isspace()
        placed.append((line, left, text))
    return placed


def wrap(text, font, width, most):
    """The text as a list of at most `most` lines of `width` pixels; a longer text ends in dots."""
    lines = []
    for line, _, word in lay_out([f" {word}" for word in text.split()], font, width):
        lines[line:] = [" ".join([*lines[line:], word])]
    if len(lines) > most:
        lines[most - 1 :] = [shorten(" ".join(lines[most - 1 :]), font, width)]
    return lines


def draw_band(draw, corners, text, color, font):
    """Draw a colored band with white text in it. Args: corners, (x1, y1, x2, y2)."""
    draw.rounded_rectangle(corners, 6, color)
    x1, y1, x2, y2 = corners
    text = shorten(text, font, x2 - x1 - 16)
    draw.text(((x1 + x2) / 2, (y1 + y2) / 2), text, "white", font, anchor="mm")


def verdict(correct, answer):
    """The verdict on an answer, (text, color). Args: correct, 0 or 1; answer, the ground truth."""
    text, color = ("right", RIGHT) if correct else ("wrong", WRONG)
    return f"{text} (ground truth: {answer})", color


# --- before and after training ---


def plot_before_after(rows, path):
    """Write an image with a row per question: the plain image, the attention before training, the
    attention after it. Args: rows, see `draw_row`; path, the output file."""
    pictures = [draw_row(*row) for row in rows]
    size = max(p.width for p in pictures), sum(p.height for p in pictures)
    sheet, y = Image.new("RGB", size, "white"), 0
    for picture in pictures:
        sheet.paste(picture, (0, y))
        y += picture.height
    sheet.save(path)


def draw_row(example, answers, side=380, gap=16):
    """Draw the columns: question, and a column per answer, with one color bar.

    Args: example, a data.Example; answers, dicts with `caption`, `map` (N,), the mean attention of
    the selected tokens, `grid`, `text` and `correct`; side, the largest width and height of a
    picture. Returns: an RGB image.
    """
    title, font, line, band = load_font(22), load_font(20), 26, 34
    size, highest = (side, side), max(max(answer["map"]) for answer in answers)
    plain = show_boxes(example.image, example.boxes, size)
    columns = [("question", plain, example.question, f"ground truth: {example.answer}", NEUTRAL)]
    for answer in answers:
        picture = overlay(
            example.image, answer["map"], answer["grid"], example.boxes, size, highest
        )
        judged = verdict(answer["correct"], example.answer)
        columns.append((answer["caption"], picture, answer["text"], *judged))
    texts = [wrap(column[2], font, side, 3) for column in columns]
    top, depth = gap + 30, 10 + line * max(map(len, texts))  # depth: of the text under a picture
    width = len(columns) * (side + gap) + gap + COLOR_BAR_WIDTH
    height = top + plain.height + depth + band + gap
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    for i, ((caption, picture, _, judgement, color), lines) in enumerate(zip(columns, texts)):
        x, y = gap + i * (side + gap), top + picture.height
        draw.text((x, gap), caption, "black", title)
        sheet.paste(picture, (x, top))
        for n, text in enumerate(lines):
            draw.text((x, y + 8 + n * line), text, "black", font)
        corners = x, y + depth, x + picture.width, y + depth + band
        draw_band(draw, corners, judgement, color, font)
    draw_color_bar(sheet, gap + len(columns) * (side + gap), top, plain.height, highest)
    return sheet


# --- the command `look` ---


def plot_answers(image, boxes, answers, path):
    """Write the image of the `look` command: one column per answer.

    A column shows the mean attention of the selected tokens over the image. Below it are all
    tokens: bluer means higher entropy, and selected tokens are underlined.

    Args: answers, dicts with `caption`, `map` (N,), `grid`, `tokens` (C strings), `entropy` (C,)
    in nats and `selected` (C,); path, the output file.
    """
    size, gap = 448, 16
    sheet = Image.new(
        "RGB", (len(answers) * (size + gap) + gap + COLOR_BAR_WIDTH, 4 * size), "white"
    )
    bottom, highest = 0, max(max(answer["map"]) for answer in answers)
    for n, answer in enumerate(answers):
        left = gap + n * (size + gap)
        column = draw_answer(sheet, left, gap, size, image, boxes, answer, highest)
        bottom = max(bottom, column + gap)
    height = fit(image, (size, size)).height
    draw_color_bar(sheet, gap + len(answers) * (size + gap), gap + 22, height, highest)
    sheet.crop((0, 0, sheet.width, min(bottom, sheet.height))).save(path)


def draw_answer(sheet, left, top, size, image, boxes, answer, highest):
    """Draw a column of `plot_answers`, `size` pixels wide. Returns: the y of its bottom."""
    draw, font, line = ImageDraw.Draw(sheet), load_font(15), 22
    draw.text((left, top), answer["caption"] or "attention per cell", "black", font)
    picture = overlay(image, answer["map"], answer["grid"], boxes, (size, size), highest)
    sheet.paste(picture, (left, top + line))
    x, y = left, top + line + picture.height + 8
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


# --- the command `probe` ---


def plot_heatmap(auroc, path):
    """Write a table of AUROCs as a heat map. Chance (0.5) and below is black.

    Args: auroc (L + 1, H + 1), a row per layer and a column per head; the last row and column are
    for the mean over all; path, the output file.
    """
    rows, cols, width, height, left, top = len(auroc), len(auroc[0]), 52, 24, 70, 24
    above_chance = [max(0.0, value - 0.5) for row in auroc for value in row]
    cells = heat(above_chance, (rows, cols), (cols * width, rows * height))
    sheet = Image.new("RGB", (left + cells.width, top + cells.height), "white")
    sheet.paste(cells, (left, top))
    draw, font = ImageDraw.Draw(sheet), load_font(13)
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
