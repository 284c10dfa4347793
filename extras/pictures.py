"""Pictures of attention: over an image, in a moving picture, and per layer and head.

C is the number of words (tokens) of an answer, N the number of cells of a map. An *answer* is a
dict:

- `caption`, the title of its column
- `words`, what each token adds to the text (C strings)
- `maps`, the attention of each token to the image (C lists of N floats)
- `grid`, (rows, cols) of the maps
- `selected`, whether the attention reward uses the token (C bools)
- `correct`, 0 or 1, only if the ground truth is known
"""

import io
import math
import re
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from statistics import fmean

from PIL import Image, ImageChops, ImageDraw, ImageFont

from data import answer_text

# matplotlib's inferno (CC0) at 0, 0.1, ..., 1. Its lightness increases steadily, so a map also
# works in grayscale and for color-blind readers.
INFERNO = "000004 160b39 420a68 6a176e 932667 bc3754 dd513a f37819 fca50a f6d746 fcffa4"
POINTS = Image.frombytes("RGB", (11, 1), bytes.fromhex(INFERNO))
# The colors of 256 levels, 3 bytes each, interpolated from the 11 points.
COLORS = POINTS.resize((256, 1), Image.Resampling.BILINEAR, box=(0.5, 0, 10.5, 1)).tobytes()
BOX_COLORS = "white", "#00d5ff"  # outer and inner line; inferno has no cyan
RIGHT, WRONG, NEUTRAL = "#00765a", "#b34700", "#444444"  # green and red that color-blind people see
MARKED = "#ffd23f"  # behind the current word
DARKEN, COLORED = 0.5, 0.4  # brightness and share of color of the image under a map

# Sizes in pixels.
GAP, CAPTION, LINE, BAND, NOTE = 14, 36, 26, 38, 28
FONT, SMALL_FONT = 19, 15
# Pillow's own font has only the letters of English. Linux, macOS or Windows have some of these.
SYSTEM_FONTS = """DejaVuSans.ttf NotoSansCJK-Regular.ttc wqy-microhei.ttc NotoSansArabic-Regular.ttf
NotoSansDevanagari-Regular.ttf NotoSansThai-Regular.ttf Arial.ttf PingFang.ttc AppleGothic.ttf
arial.ttf msyh.ttc YuGothM.ttc malgun.ttf Nirmala.ttf""".split()
COLOR_BAR_WIDTH = 80  # labels included
SIDE, GIF_SIDE = 380, 256  # the largest width and height of a photo
GIF_LINES = 4  # of a longer answer, the last lines are shown

MAX_GIF_BYTES = 1_000_000
# (most frames with words, colors): the first that keeps the file below MAX_GIF_BYTES is used.
ATTEMPTS = (48, 256), (24, 64), (6, 32)


# --- a map over an image ---


def fit(image, size):
    """The image as RGB, scaled to fit into `size` = (width, height)."""
    scale = min(limit / side for limit, side in zip(size, image.size))
    return image.resize([max(1, int(scale * side + 1e-6)) for side in image.size]).convert("RGB")


def draw_boxes(picture, boxes, image_size):
    """Outline boxes on a picture, in place, just outside their edges. Args: boxes, in pixels of the
    original image; image_size, its (width, height)."""
    draw, (width, height) = ImageDraw.Draw(picture), picture.size
    scales = [a / b for a, b in zip(picture.size, image_size)] * 2
    for box in boxes:
        x1, y1, x2, y2 = (round(v * scale) for v, scale in zip(box, scales))
        for margin, color in ((5, BOX_COLORS[0]), (3, BOX_COLORS[1])):
            # A box that reaches the edge of the image must stay visible.
            left, top = max(0, x1 - margin), max(0, y1 - margin)
            right, bottom = min(x2 + margin, width) - 1, min(y2 + margin, height) - 1
            draw.rectangle((left, top, right, bottom), outline=color, width=3)


def show_boxes(image, boxes, size):
    """The image with its boxes, scaled to fit into `size` = (width, height)."""
    picture = fit(image, size)
    draw_boxes(picture, boxes, image.size)
    return picture


def heat(attention, grid, size, highest):
    """An attention map in colors, with hard cell edges. The scale is linear, as in the reward.

    Args: attention, N numbers, one per cell of `grid` = (rows, cols); size, (width, height) in
    pixels; highest, the attention with the brightest color. Returns: an RGB image.
    """
    rows, cols = grid
    levels = Image.new("L", (cols, rows))
    levels.putdata([round(255 * min(1, max(0, a / max(highest, 1e-12)))) for a in attention])
    levels = levels.resize(size, Image.Resampling.NEAREST)
    levels.putpalette(COLORS)
    return levels.convert("RGB")


def overlay(image, attention, grid, boxes, size, highest):
    """Draw an attention map over an image, which becomes darker and less colorful.

    The map is added like light, so more attention is always brighter. Args: see `heat`; boxes, in
    pixels of `image`; size, (width, height) to fit into. Returns: an RGB image.
    """
    picture = fit(image, size)
    gray = picture.convert("L").convert("RGB")
    dark = Image.blend(gray, picture, COLORED).point(lambda v: DARKEN * v)
    picture = ImageChops.screen(dark, heat(attention, grid, picture.size, highest))
    draw_boxes(picture, boxes, image.size)
    return picture


def draw_color_bar(sheet, left, top, height, highest, clipped):
    """Draw the colors of `heat` and the attention per cell that they stand for. Args: highest, see
    `heat`; clipped, whether a cell may have more."""
    draw, font, width = ImageDraw.Draw(sheet), load_font(SMALL_FONT), 16
    sheet.paste(heat(range(255, -1, -1), (256, 1), (width, height), highest=255), (left, top))
    for part, anchor in ((0, "la"), (0.5, "lm"), (1, "ls")):
        text = f"{100 * highest * (1 - part):.3g} %"
        text += "\nor more" if clipped and part == 0 else ""
        draw.text((left + width + 5, top + part * height), text, "black", font, anchor=anchor)


def mean_map(answer):
    """The mean of the maps of an answer's selected words, N floats."""
    maps = [row for row, selected in zip(answer["maps"], answer["selected"]) if selected]
    return [fmean(cell) for cell in zip(*maps)]


def color_scale(answers):
    """The attention with the brightest color: the largest of the mean maps. A single word often
    reaches several times as much, and a scale up to that would leave most pictures dark."""
    return max(max(mean_map(answer)) for answer in answers)


# --- text ---


@cache
def load_font(size):
    return ImageFont.load_default(size=size)


@cache
def find_font(size, letters):
    """A font with all of these letters: Pillow's, or one of the system. None if there is none."""
    for name in (None, *SYSTEM_FONTS):
        try:
            font = ImageFont.truetype(name, size) if name else load_font(size)
        except OSError:  # not installed
            continue
        missing = bytes(font.getmask("\U0010ffff"))  # what is drawn for a letter it lacks
        if all(c.isspace() or bytes(font.getmask(c)) != missing for c in letters):
            return font
    return None


def shorten(text, font, width):
    """The text, cut to `width` pixels and marked with three dots if it is longer."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"{text}...") > width:
        text = text[:-1]
    return f"{text.rstrip()}..."


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


def draw_words(draw, left, top, placed, lines, styles, font):
    """Write the last `lines` lines of a text. Args: placed, see `lay_out`; styles, see `Column`."""
    first_line = max(0, placed[len(styles) - 1][0] - lines + 1)
    for (line, x, word), style in zip(placed, styles):
        if not word or line < first_line:
            continue
        x, y = left + x, top + LINE * (line - first_line)
        right = x + font.getlength(word)
        if style == "marked":
            draw.rounded_rectangle((x - 2, y - 1, right + 2, y + LINE - 4), 4, MARKED)
        if style == "underlined":
            draw.line((x, y + LINE - 3, right, y + LINE - 3), "black", 2)
        draw.text((x, y), word, "black", font)


def draw_band(draw, left, top, width, font, text, color):
    """Draw a colored band with white text in it."""
    draw.rounded_rectangle((left, top, left + width, top + BAND - 6), 6, color)
    middle = left + width / 2, top + (BAND - 6) / 2
    draw.text(middle, shorten(text, font, width - 16), "white", font, anchor="mm")


# --- a question and its answers side by side ---


@dataclass
class Column:
    title: str
    picture: Image.Image
    words: list  # the pieces of the text below
    styles: list  # of the words: "", "underlined" or "marked"; the text ends where they end
    band: tuple | None = None  # (text, color)


def question_column(example, size):
    """The question with the plain photo and its boxes."""
    words = [f" {word}" for word in example.question.split()]
    band = (f"ground truth: {answer_text(example.answer)}", NEUTRAL) if example.answer else None
    picture = show_boxes(example.image, example.boxes, size)
    return Column("question", picture, words, [""] * len(words), band)


def answer_column(example, answer, size, highest, current):
    """An answer with its mean map. The selected words are underlined. With an index `current`: the
    answer up to this word, which is marked, with the word's map."""
    band = None
    if current is not None:
        attention, styles = answer["maps"][current], [""] * current + ["marked"]
    else:
        attention = mean_map(answer)
        styles = ["underlined" if selected else "" for selected in answer["selected"]]
        if "correct" in answer:
            band = ("right", RIGHT) if answer["correct"] else ("wrong", WRONG)
    picture = overlay(example.image, attention, answer["grid"], example.boxes, size, highest)
    return Column(answer["caption"], picture, answer["words"], styles, band)


def draw_row(example, answers, side=SIDE, lines=math.inf, current=None):
    """Draw a question and its answers side by side, with one color bar and a note below.

    Args: example, a data.Example; side, the largest width and height of a photo; lines, shown of an
    answer; current, the index of the current word of each answer. By default, the answers are
    complete and have mean maps. Returns: an RGB image, whose size does not depend on `current`.
    """
    size, highest = (side, side), color_scale(answers)
    columns = [question_column(example, size)]
    for answer, word in zip(answers, current or [None] * len(answers)):
        columns.append(answer_column(example, answer, size, highest, word))
    note = "attention at the marked word" if current else "mean attention of the underlined words"
    note += "; box: the region of the answer" if example.boxes else ""
    # as the tiny model names a place
    if place := re.search(r"\br(\d) c(\d)\b", "".join(answers[0]["words"])):
        note += f"; {place[0]}: row {place[1]}, column {place[2]}"

    bands = [column.band[0] for column in columns if column.band]
    letters = set("".join([*bands, *(word for column in columns for word in column.words)]))
    font = find_font(FONT, "".join(sorted(letters))) or load_font(FONT)
    texts = [lay_out(column.words, font, side) for column in columns]
    limits = [math.inf, *[lines] * len(answers)]  # the question is complete
    text_height = LINE * max(min(limit, text[-1][0] + 1) for limit, text in zip(limits, texts))
    text_top = CAPTION + columns[0].picture.height + 8
    band_top = text_top + text_height + 8
    height = band_top + (BAND if columns[0].band else 0) + NOTE
    bar_left = GAP + len(columns) * (side + GAP)
    sheet = Image.new("RGB", (bar_left + COLOR_BAR_WIDTH, height), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (column, text, limit) in enumerate(zip(columns, texts, limits)):
        left = GAP + i * (side + GAP)
        draw.text((left, 8), column.title, "black", font)
        sheet.paste(column.picture, (left, CAPTION))
        draw_words(draw, left, text_top, text, limit, column.styles, font)
        if column.band:
            draw_band(draw, left, band_top, side, font, *column.band)
    bar_height = max(80, columns[0].picture.height)  # its labels need space
    draw_color_bar(sheet, bar_left, CAPTION, bar_height, highest, clipped=current is not None)
    draw.text((GAP, height - NOTE), note, "#555555", load_font(SMALL_FONT))
    return sheet


def plot_before_after(rows, path):
    """Write a picture with a row per question. Args: rows, pairs of an example and its answers."""
    pictures = [draw_row(example, answers) for example, answers in rows]
    sheet, y = Image.new("RGB", (pictures[0].width, sum(p.height for p in pictures)), "white"), 0
    for picture in pictures:
        sheet.paste(picture, (0, y))
        y += picture.height
    sheet.save(path)


# --- the moving picture ---


def plot_animation(example, answers, path):
    """Write a looping GIF of one or two answers. Each frame adds a word, marks it and shows its
    attention; a long answer adds several words per frame. The first word in which two answers
    differ is held longer. The last frame shows the mean maps."""
    image = fit(example.image, (GIF_SIDE, GIF_SIDE))  # once, because a photo can be large
    scales = [new / old for new, old in zip(image.size, example.image.size)] * 2
    boxes = [[v * scale for v, scale in zip(box, scales)] for box in example.boxes]
    example = replace(example, image=image, boxes=boxes)
    words = [answer["words"] for answer in answers]
    for most, colors in ATTEMPTS:
        currents = list_frames(words, most)
        frames = [
            draw_row(example, answers, GIF_SIDE, GIF_LINES, current)
            for current in [*currents, None]
        ]
        written = [{each[i].strip() for each, i in zip(words, current)} for current in currents]
        decides = next((i for i, texts in enumerate(written) if len(texts) > 1), 0)
        content = encode(frames, colors, decides)
        if len(content) <= MAX_GIF_BYTES:
            break
    Path(path).write_bytes(content)


def list_frames(words, most):
    """The index of the current word of every answer, for each frame.

    Args: words, of every answer; most, frames. Words without visible text get no frame. A shorter
    answer stays at its last word.
    """
    visible = [[i for i, word in enumerate(each) if word.strip()] or [0] for each in words]
    count = max(map(len, visible))
    step = -(-count // most)  # words per frame
    last = [min(i + step, count) - 1 for i in range(0, count, step)]
    return [[each[min(i, len(each) - 1)] for each in visible] for i in last]


def encode(frames, colors, held):
    """The frames as a looping GIF with one palette, so that no color flickers. Args: held, the
    index of a frame to show longer. Returns: bytes."""
    strip = Image.new("RGB", (frames[0].width, frames[0].height * len(frames)))
    for i, frame in enumerate(frames):
        strip.paste(frame, (0, frame.height * i))
    palette = strip.quantize(colors, Image.Quantize.FASTOCTREE)
    first, *rest = (frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames)
    durations = [1500, *[400] * (len(frames) - 2), 4000]  # milliseconds
    durations[held] = 2000
    file = io.BytesIO()
    first.save(file, "GIF", save_all=True, append_images=rest, duration=durations, loop=0)
    return file.getvalue()


# --- the command `probe` ---


def plot_heatmap(auroc, path):
    """Write a table of AUROCs as a heat map. Chance (0.5) and below is black.

    Args: auroc (L + 1, H + 1), a row per layer and a column per head; the last row and column are
    for the mean over all; path, the output file.
    """
    rows, cols, width, height, left, top = len(auroc), len(auroc[0]), 52, 24, 70, 24
    above_chance = [value - 0.5 for row in auroc for value in row]
    cells = heat(above_chance, (rows, cols), (cols * width, rows * height), max(above_chance))
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
            draw.text(position, f"{value:.2f}", "white", font, "mm", stroke_width=1, stroke_fill=0)
    sheet.save(path)
