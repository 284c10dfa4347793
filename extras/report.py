"""What a run shows at its end: report.html, look.png, before_after.png, look.gif and the adapter's
card. The page is one self-contained file: report.html, report.css and report.js in this folder, and
the data and charts that this module adds."""

import base64
import html
import io
import json
import math
import re
from functools import partial
from itertools import zip_longest
from pathlib import Path
from statistics import fmean

from config import is_tiny
from data import answer_text
from evaluate import LEVELS, count_corrected, pack_map, results_table, unpack_map, verdict
from extras.model_card import PLACEBO, attention_source, model_card
from extras.pictures import COLORS, color_scale, mean_map, plot_animation, plot_before_after

HERE = Path(__file__).parent
IN_PICTURE, WITH_MAPS = 4, 8  # held-out questions in look.png, and with maps on the page
# These keep the page below 1 MB: bytes of all questions with maps, and of the list of questions;
# characters per text, points per curve, and pixels per side of a photo.
MAPS_BYTES, LIST_BYTES, MAX_TEXT, MAX_POINTS, MAX_SIDE = 700_000, 200_000, 240, 200, 336
LINE_STYLES = 4  # the classes line0 to line3 of report.css
TINY_STORY = (
    "We made this model careless: the white card catches its eye first, whatever the question is."
)
TINY_WORDS = "r5 c3 means row 5, column 3."
CHARTS = {  # title -> metrics in metrics.jsonl
    "rewards, mean of a step": "rewards/.*/mean",
    "rewards, standard deviation within a group": "rewards/.*/std",
    "AUROC of the attention, sampled completions": "attention/auroc",
    "entropy, nats": "entropy",
    "completion length, tokens": "completions/mean_length",
    "KL from the base model, nats per token": "kl",
}


def write_report(run, examples):
    """Write report.html, and for a finished run also the pictures and the adapter's card.

    Args: run, a checkpoint.RunDirectory; examples, the held-out examples.
    """
    before, after = run.read_json("before.json"), run.read_json("after.json")
    finished = run.step >= run.settings["max_steps"]
    if not finished:
        after = None  # of an earlier end, if the run was extended
    if before and after:

        def pair(i):
            return examples[i], [as_answer(before[i], "before"), as_answer(after[i], "after")]

        first = [pair(i) for i in range(len(before))[:IN_PICTURE]]
        telling = pair(most_telling(before, after))
        run.atomic_write("look.png", partial(plot_before_after, first))
        run.atomic_write("before_after.png", partial(plot_before_after, [telling]))
        run.atomic_write("look.gif", partial(plot_animation, *telling))
    if finished and (run.folder / "adapter").exists():
        run.write_text("adapter/README.md", model_card(run.settings, before, after))
    run.write_text("report.html", render_page(run, before, after, examples))


def lead(before, after):
    """What changed, in two sentences without statistics."""
    right = [sum(row["correct"] for row in rows) for rows in (before, after)]
    wrong, wrong_after = (sum(not row["early"] for row in rows) for rows in (before, after))
    return (
        f"Right answers: {right[0]:.0f} of {len(before)} before, {right[1]:.0f} after training. "
        f"Wrong first looks corrected: {count_corrected(before)} of {wrong} before, "
        f"{count_corrected(after)} of {wrong_after} after."
    )


def most_telling(before, after):
    """The index of the question to show: the first that training corrected after a wrong first look
    that stayed wrong. If there is none, the first that it corrected; else the first."""

    def score(i):
        old, new = before[i], after[i]
        fixed = new["correct"] > old["correct"]
        return fixed, fixed and not old["early"] and not new["early"] and new["late"]

    return max(range(len(before)), key=score)


def as_answer(row, name):
    """A result of `evaluate` as an answer for `extras.pictures`."""
    maps = [unpack_map(packed) for packed in row["maps"]]
    return row | {"caption": f"{name} training", "maps": maps}


# --- the page ---


def render_page(run, before, after, examples):
    """The text of report.html. Args: see `write_report`; before, after, results of `evaluate`, or
    None."""
    settings, evaluations = run.settings, {"before": before, "after": after}
    evaluations = {name: rows for name, rows in evaluations.items() if rows}
    model, data_set = (Path(settings[name]).name for name in ("model_name_or_path", "dataset"))
    steps = f"{run.step} of {settings['max_steps']} training steps"
    steps += f"; region: {PLACEBO}" if settings["region"] == "rolled" else ""
    tiny_world = is_tiny(settings["model_name_or_path"]) and data_set == "scenes"
    questions = list(zip(*evaluations.values()))  # the results of a question, once or twice
    chosen = most_telling(before, after) if before and after else 0
    order = sorted(range(len(questions)), key=lambda i: i != chosen)[:WITH_MAPS]
    shown = (to_json(describe_maps(examples[i], questions[i], evaluations)) for i in order)
    data = {"levels": LEVELS, "colors": COLORS.hex(), "names": list(evaluations)}
    parts = {
        "RUN": f"{model} on {data_set}, {steps}",
        "SETTINGS": "\n".join(f"{name}: {value}" for name, value in settings.items()),
        "STORY": TINY_STORY if tiny_world else "",
        "WORDS": TINY_WORDS if tiny_world else "",
        "LEAD": lead(before, after) if after else "",
        "VERDICT": verdict(before, after) if after else "The run is not finished.",
        "TABLE": results_table(before, after) if after else "",
        "REWARDED": attention_source(settings),
    }
    parts = {name: html.escape(text) for name, text in parts.items()} | {
        "METRIC_CHARTS": "\n".join(metric_charts(run.history())),
        "POSITION_CHARTS": "\n".join(position_charts(evaluations)),
        "QUESTIONS": list_questions(questions, evaluations),
        "DATA": to_json(data),
        "SHOWN": ",".join(first_bytes(shown, MAPS_BYTES)),
        "STYLE": (HERE / "report.css").read_text("utf-8"),
        "SCRIPT": (HERE / "report.js").read_text("utf-8"),
    }
    page = (HERE / "report.html").read_text("utf-8")
    return re.sub("@([A-Z_]+)@", lambda match: parts[match[1]], page)


def to_json(data):
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    return text.replace("<", "\\u003c")  # a question may contain "</script>"


def first_bytes(texts, most):
    """The first texts that have at most `most` bytes in all, and at least one."""
    kept = []
    for text in texts:
        most -= len(text.encode())
        if kept and most < 0:
            break
        kept.append(text)
    return kept


def list_questions(questions, names):
    """The answers to the first questions, as HTML: a folded list per combination of right and
    wrong. Args: questions, the results of each before and after; names, "before" and "after"."""
    items, groups, place = [], {}, {1: "on the region", 0: "off"}
    for number, rows in enumerate(questions, 1):
        texts = [f"{rows[0]['question']} (answer: {answer_text(rows[0]['answer'])})"]
        for name, row in zip(names, rows):
            looks = f"first look {place[row['early']]}, last look {place[row['late']]}"
            texts.append(f"{name} ({looks}): {row['text']}")
        paragraphs = "".join(f"<p>{html.escape(cut(text))}</p>" for text in texts)
        items.append(f'<li value="{number}">{paragraphs}</li>')
    kept = first_bytes(items, LIST_BYTES)
    for item, rows in zip(kept, questions):
        correct = ["right" if row["correct"] else "wrong" for row in rows]
        title = ", ".join(f"{word} {name}" for word, name in zip(correct, names))
        groups.setdefault(title, []).append(item)
    lists = [
        f"<details><summary>{title} ({len(group)})</summary><ol>{''.join(group)}</ol></details>"
        for title, group in groups.items()
    ]
    return "\n".join([f"<p>{len(kept)} of {len(questions)} questions:</p>", *lists])


def describe_maps(example, rows, names):
    """A question with its photo and maps, a dict for JSON. `scale` is the attention with the
    brightest color, `mean` the mean map of the selected words. Args: rows, its results."""
    unpacked = [as_answer(row, name) for row, name in zip(rows, names)]
    answers = []
    for row, maps in zip(rows, unpacked):
        keys = "correct", "words", "grid", "maps", "look_maps", "selected"
        answer = {key: row[key] for key in keys}
        answers.append(answer | {"mean": pack_map(mean_map(maps))})
    return {
        "question": cut(example.question),
        "truth": cut(answer_text(example.answer)),
        "answers": answers,
        "image": image_as_url(example.image),
        "size": example.image.size,
        "boxes": example.boxes,
        "scale": color_scale(unpacked),
    }


def cut(text):
    return text if len(text) <= MAX_TEXT else f"{text[:MAX_TEXT]}..."


def image_as_url(image):
    """An image as a data URL: PNG if small, otherwise a JPEG of at most MAX_SIDE."""
    kind, file = "png" if max(image.size) <= 128 else "jpeg", io.BytesIO()
    image = image.convert("RGB")
    image.thumbnail((MAX_SIDE, MAX_SIDE))
    image.save(file, kind, quality=80)
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


# --- charts ---


def metric_charts(steps):
    """The training curves, a list of SVGs. Args: steps, an iterator over rows of metrics.jsonl."""
    charts = {title: {} for title in CHARTS}
    for step in steps:
        if step["step"] == 1:
            shown = [
                (t, n) for t, pattern in CHARTS.items() for n in step if re.fullmatch(pattern, n)
            ]
        for title, name in shown:
            label = name.split("/")[1] if name.startswith("rewards/") else name
            charts[title].setdefault(label, []).append(step[name])
    return [line_chart(title, lines, "step") for title, lines in charts.items()]


def position_charts(evaluations):
    """The mean attention to the region and to the whole image at each token of the answers, two
    SVGs with one scale. Args: evaluations, {name: results}."""
    charts = {"attention to the region": {}, "attention to the whole image": {}}
    for key, lines in zip(("to_region", "to_image"), charts.values()):
        for name, rows in evaluations.items():
            lines[f"{name} training"] = mean_by_position([row[key] for row in rows])
    highest = max((max(line) for lines in charts.values() for line in lines.values()), default=0)
    return [line_chart(title, lines, "token", highest) for title, lines in charts.items()]


def mean_by_position(lists):
    """The mean of the first numbers of some lists, of the second numbers, and so on, while at least
    a third of the lists are that long."""
    columns = [[v for v in column if v is not None] for column in zip_longest(*lists)]
    return [fmean(column) for column in columns if 3 * len(column) >= len(lists)]


def line_chart(title, lines, x_label, highest=-math.inf):
    """Draw a line chart as inline SVG. Several lines get a legend.

    Args: lines, {name: values at x = 1, 2, ...}, with None for a missing value; highest, that the
    y axis reaches at least. Returns: the SVG as a string, or "" if there are no values.
    """
    longest = max((len(values) for values in lines.values()), default=0)
    values = [v for line in lines.values() for v in line if v is not None]
    if not values:
        return ""
    width, height, left, right, top, bottom = 420, 190, 52, 408, 26, 156
    legend = 14 * len(lines) if len(lines) > 1 else 0
    low = min(0.0, *values)
    high = max(highest, *values)
    high = high if high > low else low + 1
    parts = [
        f'<svg class="chart" viewBox="0 0 {width} {height + legend}">',
        f'<text x="{left}" y="14" class="title">{html.escape(title)}</text>',
        f'<path class="axis" d="M{left},{top} V{bottom} H{right}"/>',
        f'<text x="{left - 5}" y="{top + 6}" text-anchor="end">{high:.2g}</text>',
        f'<text x="{left - 5}" y="{bottom}" text-anchor="end">{low:.2g}</text>',
        f'<text x="{left}" y="{bottom + 15}">1</text>',
        f'<text x="{right}" y="{bottom + 15}" text-anchor="end">{x_label} {longest}</text>',
    ]
    for n, (name, line) in enumerate(lines.items()):
        points = [
            f"{left + (right - left) * x / max(1, longest - 1):.1f},"
            f"{bottom - (bottom - top) * (value - low) / (high - low):.1f}"
            for x, value in average_bins(line)
        ]
        y, style = height + 14 * n, f'class="line{n % LINE_STYLES}"'
        parts.append(f'<polyline {style} points="{" ".join(points)}"/>')
        if legend:
            parts.append(f'<path {style} d="M{left},{y - 4} h36"/>')
            parts.append(f'<text x="{left + 42}" y="{y}">{html.escape(name)}</text>')
    return "".join(parts) + "</svg>"


def average_bins(values):
    """At most MAX_POINTS points (mean position, mean value) of a curve, so that the page stays
    small. None values are ignored."""
    known = [(x, value) for x, value in enumerate(values) if value is not None]
    size = math.ceil(len(known) / MAX_POINTS)
    return [tuple(map(fmean, zip(*known[i : i + size]))) for i in range(0, len(known), size or 1)]
