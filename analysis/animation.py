"""look.gif: answers appear word by word, and the attention of each word lights up on the image."""

import io
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean

from PIL import Image, ImageDraw

from analysis.plots import (
    COLOR_BAR_WIDTH,
    draw_band,
    draw_color_bar,
    fit,
    lay_out,
    load_font,
    overlay,
    show_boxes,
    verdict,
    wrap,
)

MAX_BYTES, MAX_HEIGHT, PANEL_WIDTH = 1_000_000, 460, 400  # two panels are 800 pixels wide
# (most frames with words, colors): the first that keeps the file below MAX_BYTES is used.
ATTEMPTS = (48, 256), (24, 64), (12, 64), (6, 32)
MARGIN, QUESTION, CAPTION, TEXT, BAND = 12, 32, 28, 27, 42  # pixels
MAX_LINES = 3  # of an answer; a longer one scrolls
MARKED = "#ffd23f"  # behind the current word
START, END = "start", "end"  # the moments before the first word and after the last
NOTES = {START: "box: region of the answer", END: "mean of the underlined words"}


def choose_question(before, after):
    """The held-out question to show: the first whose answer changed from wrong to right. If there
    is none, the first whose answer changed from right to wrong; else the first question.
    Args: before, after, results of `evaluate`. Returns: its index."""
    pairs = [(old["correct"], new["correct"]) for old, new in zip(before, after)]
    rank = [(new > old) + (new != old) for old, new in pairs]
    return rank.index(max(rank))


def mean_map(maps, selected):
    """The mean (N,) of the selected rows of maps (C, N)."""
    return [fmean(cell) for cell in zip(*(row for row, chosen in zip(maps, selected) if chosen))]


def plot_animation(example, answers, path):
    """Write a looping GIF: one answer, or the answers before and after training side by side.

    It starts with the image and its boxes. Then each frame adds a word, marks it and shows its
    attention; a long answer adds several words per frame and shows the last one's. The last frame
    shows the mean of the selected words and, if the ground truth is known, right or wrong.

    Args: example, a data.Example; answers, one or two dicts with `caption`; `words`, what each
    token adds to the text (C strings); `maps` (C, N), the attention of each token; `grid`;
    `selected` (C,) bool; and, if the ground truth is known, `correct`. See `color_scale`.
    """
    for most, colors in ATTEMPTS:
        moments = list_moments([answer["words"] for answer in answers], most)
        content = encode(draw_frames(example, answers, moments), colors)
        if len(content) <= MAX_BYTES:
            break
    Path(path).write_bytes(content)


def list_moments(words, most):
    """The frames: for each, START, END, or the index of the current token of every answer.

    Args: words, of every answer; most, frames with words. Tokens without visible text get no frame.
    A shorter answer stays at its last word.
    """
    visible = [[i for i, word in enumerate(each) if word.strip()] or [0] for each in words]
    count = max(map(len, visible))
    step = -(-count // most)  # words per frame
    last = [min(i + step, count) - 1 for i in range(0, count, step)]
    return [START, *([each[min(i, len(each) - 1)] for each in visible] for i in last), END]


@dataclass
class Layout:
    """The parts of a frame whose size depends on the question, the image and the answers."""

    question: list[str]  # lines
    words: list[list[tuple]]  # of every answer, see `lay_out`
    lines: int  # shown of an answer
    top: int  # of the pictures
    picture: tuple[int, int]  # width and height
    size: tuple[int, int]  # of the frame


def plan(example, answers):
    """The Layout of all frames. Pictures are as large as MAX_HEIGHT and PANEL_WIDTH permit."""
    inside, width = PANEL_WIDTH - 2 * MARGIN, PANEL_WIDTH * len(answers)
    question = wrap(example.question, load_font(24), width - 2 * MARGIN, 2)
    words = [lay_out(answer["words"], load_font(21), inside) for answer in answers]
    lines = min(MAX_LINES, 1 + max(line for each in words for line, _, _ in each))
    top = MARGIN + QUESTION * len(question) + CAPTION
    below = 8 + TEXT * lines + BAND * is_judged(answers) + MARGIN
    picture = fit(example.image, (inside - COLOR_BAR_WIDTH, MAX_HEIGHT - top - below)).size
    return Layout(question, words, lines, top, picture, (width, top + picture[1] + below))


def is_judged(answers):
    return all("correct" in answer for answer in answers)


def draw_frames(example, answers, moments):
    """The frames as RGB images. Arguments as in `plot_animation`; moments, see `list_moments`."""
    layout = plan(example, answers)
    example = resize(example, layout.picture)  # once, because a photo can be large
    highest, frames = color_scale(answers), []
    for moment in moments:
        frame = Image.new("RGB", layout.size, "white")
        draw = ImageDraw.Draw(frame)
        for i, text in enumerate(layout.question):
            draw.text((MARGIN, MARGIN + QUESTION * i), text, "black", load_font(24))
        for i, answer in enumerate(answers):
            at = moment if moment in (START, END) else moment[i]
            draw_panel(frame, i, example, answer, layout, highest, at)
        frames.append(frame)
    return frames


def color_scale(answers):
    """The attention with the brightest color: the largest of the mean maps. A single word often
    reaches several times as much, and a scale up to that would leave most frames dark."""
    return max(max(mean_map(answer["maps"], answer["selected"])) for answer in answers)


def resize(example, size):
    """The example with its image resized to `size` = (width, height), and its boxes."""
    scales = [new / old for new, old in zip(size, example.image.size)] * 2
    boxes = [[v * scale for v, scale in zip(box, scales)] for box in example.boxes]
    return replace(example, image=example.image.convert("RGB").resize(size), boxes=boxes)


def draw_panel(frame, number, example, answer, layout, highest, at):
    """Draw the panel of an answer. Args: at, START, END or the index of the current token."""
    draw, left = ImageDraw.Draw(frame), PANEL_WIDTH * number + MARGIN
    y, caption, title = layout.top - 6, answer["caption"], load_font(20)
    draw.text((left, y), caption, "black", title, anchor="ls")
    if at != START or example.boxes:
        x = left + (title.getlength(f"{caption}  ") if caption else 0)
        note = NOTES.get(at, "attention at the marked word")
        draw.text((x, y), note, "#555555", load_font(16), anchor="ls")
    frame.paste(draw_picture(example, answer, layout, highest, at), (left, layout.top))
    if at != START:
        corner = left + layout.picture[0] + 8, layout.top
        draw_color_bar(frame, *corner, layout.picture[1], highest, clipped=at != END)
    y = layout.top + layout.picture[1] + 8
    if at != START:
        draw_words(draw, left, y, answer, layout.words[number], layout.lines, at)
    y += TEXT * layout.lines
    if at == END and "correct" in answer:
        corners = left, y + 4, left + PANEL_WIDTH - 2 * MARGIN, y + BAND - 4
        draw_band(draw, corners, *verdict(answer["correct"], example.answer), load_font(21))


def draw_picture(example, answer, layout, highest, at):
    """The picture of a panel: the plain image at START, else the map of the current token, or at
    END the mean map of the selected tokens."""
    if at == START:
        return show_boxes(example.image, example.boxes, layout.picture)
    mean = at == END
    attention = mean_map(answer["maps"], answer["selected"]) if mean else answer["maps"][at]
    settings = example.boxes, layout.picture, highest
    return overlay(example.image, attention, answer["grid"], *settings)


def draw_words(draw, left, top, answer, words, lines, at):
    """Write the answer up to the current token, which is marked; only the last `lines` lines. At
    END, underline the selected tokens. Args: words, the answer's, as placed by `lay_out`."""
    font = load_font(21)
    current = len(words) - 1 if at == END else at
    first_line = max(0, words[current][0] - lines + 1)
    for i, (line, x, word) in enumerate(words[: current + 1]):
        if line < first_line or not word:
            continue
        x, y = left + x, top + TEXT * (line - first_line)
        right = x + font.getlength(word)
        if i == at:
            draw.rounded_rectangle((x - 3, y - 1, right + 3, y + TEXT - 3), 4, MARKED)
        if at == END and answer["selected"][i]:
            draw.line((x, y + TEXT - 3, right, y + TEXT - 3), "black", 2)
        draw.text((x, y), word, "black", font)


def encode(frames, colors):
    """The frames as a looping GIF with one palette, so that no color flickers. Returns: bytes."""
    strip = Image.new("RGB", (frames[0].width, frames[0].height * len(frames)))
    for i, frame in enumerate(frames):
        strip.paste(frame, (0, frame.height * i))
    palette = strip.quantize(colors, Image.Quantize.FASTOCTREE)
    first, *rest = (frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames)
    word = min(700, max(200, 10_000 // len(frames)))  # milliseconds
    durations = [1500, *[word] * (len(frames) - 2), 4000]
    file = io.BytesIO()
    first.save(file, "GIF", save_all=True, append_images=rest, duration=durations, loop=0)
    return file.getvalue()
