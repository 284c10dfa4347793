"""report.html: a run on one page, in a single file. This module collects the data and draws the
charts; report_template.html, report.css and report.js are the page. Imports only the standard
library."""

import base64
import html
import io
import json
import math
import re
from pathlib import Path
from statistics import fmean

from analysis.alarms import trend_alarms
from analysis.results_table import count_corrected, count_looks, have_looks, results_table
from config import parse_weights
from runtime.run_folder import join_flags
from runtime.settings import FIELDS

# matplotlib's inferno (CC0) at 0, 0.1, ..., 1. Its lightness increases steadily, so the map also
# works in grayscale and for color-blind readers.
INFERNO = "000004 160b39 420a68 6a176e 932667 bc3754 dd513a f37819 fca50a f6d746 fcffa4"
# An attention value is stored as one of these 64 characters.
LEVELS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz-_"
MAX_GRID_SIDE = 12  # cells per side of a map in the report
LISTED, LISTED_CHARACTERS = 500, 150_000  # questions in the list, characters of all their answers
LINE_COLORS = 6  # the classes line0 to line5 of report.css
CURVES = {  # chart title -> metrics in metrics.jsonl; reward charts are added
    "AUROC of the attention, sampled completions": ["attention/auroc"],
    "entropy, nats": ["entropy"],
    "completion length, tokens": ["completions/mean_length"],
    "KL from the pre-training model, nats per token": ["kl"],
}


def render_report(folder, examples):
    """Render the report from the files in a run's folder. The run may be unfinished.

    Args: folder, of the run; examples, the held-out data set.
    Returns: {"report.html": text, "response.svg": text}.
    """
    folder = Path(folder)
    config, before, after = (
        read_json(folder / f"{name}.json") for name in ("config", "before", "after")
    )
    steps = read_metrics(folder / "metrics.jsonl")
    charts = position_charts(before, after) if before else []
    status = f"{len(steps)} of {config['max_steps']} steps" + ("" if after else ": not finished")
    table = results_table(before, after or before) if before else ""
    data = {
        "levels": LEVELS,
        "inferno": INFERNO,
        "rewarded": rewarded_maps(config),
        "questions": list_questions(before, after),
        "total": len(before or []),
        "examples": example_data(examples, before, after),
    }
    parts = {
        "STATUS": html.escape(
            f"{Path(config['model_name_or_path']).name}, {config['dataset']}: {status}"
        ),
        "SETTINGS": html.escape(settings_command(config)),
        "TABLE": html.escape(table.partition("\n\n")[0]),  # the looks have their own table
        "LOOKS": looks_section(before, after),
        "METRIC_CHARTS": "\n".join(metric_charts(steps, first_alarm(steps, config))),
        "POSITION_CHARTS": "\n".join(charts),
        # An example may contain "</script>".
        "DATA": json.dumps(data, separators=(",", ":")).replace("<", "\\u003c"),
        "SCRIPT": read_asset("report.js"),
    }
    page = fill_template("report_template.html", parts)
    return {"report.html": page, "response.svg": stack_charts(charts)}


def fill_template(name, parts):
    """The text of a template with each @PART@ replaced. @STYLE@ is the shared style sheet."""
    parts = parts | {"STYLE": read_asset("report.css")}
    return re.sub("@([A-Z_]+)@", lambda match: parts[match[1]], read_asset(name))


def read_asset(name):
    return (Path(__file__).parent / name).read_text(encoding="utf-8")


def settings_command(config):
    """The command that starts a run with the settings in config.json, except --output_dir."""
    names = [name for name in FIELDS if name in config.keys() - {"output_dir", "resume"}]
    switches = {True: "--", False: "--no-"}
    flags = [
        f"{switches[config[name]]}{name}"
        if type(config[name]) is bool
        else f"--{name}={config[name]}"
        for name in names
    ]
    return f"python sayo_mini.py {join_flags(flags)}"


def rewarded_maps(config):
    """The layers and heads that the reward uses, such as "layer 3, all heads"."""
    names = []
    for kind in ("layers", "heads"):
        chosen = config.get(kind, "all")
        several = f"{kind if ',' in chosen else kind[:-1]} {chosen}"
        names.append(f"all {kind}" if chosen == "all" else several)
    return ", ".join(names)


def read_json(path):
    """The content of a JSON file, or None if it does not exist."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def read_metrics(path):
    """The rows of metrics.jsonl, or [] if it does not exist."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [json.loads(line) for line in lines]


def example_data(examples, before, after):
    """The page's data for every example whose results contain maps, a list of dicts for JSON."""
    evaluations = [results for results in (before, after) if results]
    data, means = [], {}
    for i, result in enumerate(before or []):
        if not result["page"]:
            continue
        example, grid = examples[i], small_grid(result["grid"])
        if grid not in means:
            means[grid] = [mean_map(results, grid) for results in evaluations]
        results = [
            results[i]["page"]
            | {key: results[i][key] for key in ("selected", "correct")}
            | {key: results[i][key] for key in ("early", "late") if key in results[i]}
            | {"mean": mean and {"grid": grid, "map": mean}}
            for results, mean in zip(evaluations, means[grid])
        ]
        data.append(
            {
                "index": i,
                "image": image_as_url(example.image),
                "size": example.image.size,
                "boxes": example.boxes,
                "question": example.question,
                "answer": example.answer,
                "results": results,
            }
        )
    return data


def list_questions(before, after):
    """The held-out questions for the list on the page: [question, true answer, results], with
    [text, right or wrong, early look, late look] for each evaluation; the looks are None in results
    of earlier versions. Long texts are cut so that the page stays small."""
    evaluations = [results[:LISTED] for results in (before, after) if results]
    count = sum(map(len, evaluations))
    longest = max(60, LISTED_CHARACTERS // max(1, count))

    def cut(text):
        return text if len(text) <= longest else text[: longest - 1] + "\u2026"

    return [
        [
            cut(rows[0].get("question", str(rows[0].get("id", "")))),
            cut(rows[0].get("answer", "")),
            [
                [cut(row.get("text", "")), row["correct"], row.get("early"), row.get("late")]
                for row in rows
            ],
        ]
        for rows in zip(*evaluations)
    ]


def looks_section(before, after):
    """The 2 x 2 of early and late looks as HTML, before and after training. A click on one of its
    cells filters the questions. Empty for results of earlier versions, which lack the looks."""
    evaluations = [("before", before), ("after", after)]
    evaluations = [(name, results) for name, results in evaluations if results]
    if not evaluations or not have_looks(*(results for _, results in evaluations)):
        return ""
    return "".join(
        looks_table(n, name, results) for n, (name, results) in enumerate(evaluations)
    ).join(('<div class="looks">', "</div>"))


def looks_table(n, name, results):
    """One of the tables of `looks_section`. Args: n, 0 for before and 1 for after training."""
    rows = ""
    for early, title in ((1, "early on the region"), (0, "early elsewhere")):
        cells = "".join(
            f'<td><button class="look" aria-pressed="false" data-result="{n}" data-early="{early}"'
            f' data-late="{late}">{count_looks(results, early, late)}</button></td>'
            for late in (1, 0)
        )
        rows += f'<tr><th scope="row">{title}</th>{cells}</tr>'
    corrected = f"wrong early looks corrected: {count_corrected(results)}"
    head = '<th scope="col">late on the region</th><th scope="col">late elsewhere</th>'
    return (
        f"<table><caption>{name} training</caption><tr><td></td>{head}</tr>{rows}"
        f'<tr><td colspan="3">{corrected}</td></tr></table>'
    )


def small_grid(grid):
    """The grid (rows, cols) to which `page_maps.small_map` pools a map."""
    rows, cols = grid
    return min(MAX_GRID_SIDE, rows), min(MAX_GRID_SIDE, cols)


def mean_map(results, grid):
    """The mean over all questions of the map of the selected tokens, on `grid`, packed. None for
    results of earlier versions, which lack these maps."""
    if not all("small_map" in row for row in results):
        return None
    maps = [
        resample(unpack_map(row["small_map"]), small_grid(row["grid"]), grid) for row in results
    ]
    return pack_map([fmean(values) for values in zip(*maps)])


def resample(values, grid, new_grid):
    """A map on another grid: each cell gets the value at its center. The grids of images with
    different aspect ratios differ."""
    (rows, cols), (new_rows, new_cols) = grid, new_grid
    centers = ((2 * y + 1, 2 * x + 1) for y in range(new_rows) for x in range(new_cols))
    return [
        values[y * rows // (2 * new_rows) * cols + x * cols // (2 * new_cols)] for y, x in centers
    ]


def image_as_url(image, longest=336):
    """An image as a data URL: PNG if small, otherwise JPEG with at most `longest` px per side."""
    image = image.convert("RGB")
    lossless = max(image.size) <= 128
    image.thumbnail((longest, longest))
    file = io.BytesIO()
    image.save(file, "PNG") if lossless else image.save(file, "JPEG", quality=80)
    encoded = base64.b64encode(file.getvalue()).decode()
    return f"data:image/{'png' if lossless else 'jpeg'};base64,{encoded}"


def pack_map(attention):
    """Pack an attention map as [largest value, a string with one character of LEVELS per cell].

    The level is the square root of the cell's fraction of the largest value, in 64 steps.
    """
    largest = max(max(attention), 1e-12)
    levels = (round(63 * (max(0.0, a) / largest) ** 0.5) for a in attention)
    return [round(largest, 5), "".join(LEVELS[level] for level in levels)]


def unpack_map(packed):
    """The attention of each cell, from `pack_map`."""
    largest, cells = packed
    return [largest * (LEVELS.index(cell) / 63) ** 2 for cell in cells]


def pack_maps(maps):
    """Pack several maps as [largest value, text]. In the text, a map is one character for its own
    largest value, as in `pack_map`, followed by its cells."""
    largest, scales = pack_map([max(attention) for attention in maps])
    return [largest, "".join(scale + pack_map(cells)[1] for scale, cells in zip(scales, maps))]


def is_packed(content, grid):
    """Whether decoded JSON is a map of this grid from `pack_map`; the file may be damaged."""
    (largest, cells), (rows, cols) = content, grid
    valid = type(largest) in (int, float) and 0 <= largest < math.inf and isinstance(cells, str)
    return valid and len(cells) == rows * cols and set(cells) <= set(LEVELS)


def first_alarm(steps, config):
    """The first of the `trend_alarms` of a run, (step, name, message), or None.
    Args: steps, the rows of metrics.jsonl."""
    text = config.get("reward_weights")  # None in runs of an earlier version
    weights = parse_weights(text) if text else {}
    return next(trend_alarms(steps, config["prompts_per_step"], weights), None)


def metric_charts(steps, alarm=None):
    """The training curves of all logged rewards and of CURVES, as a list of SVGs.

    Args: steps, the rows of metrics.jsonl; alarm, from `first_alarm`, or None.
    """
    logged = dict.fromkeys(name for step in steps for name in step)  # an ordered set
    rewards = [name for name in logged if name.startswith("rewards/")]
    curves = {
        "rewards, mean of a step": [name for name in rewards if name.endswith("/mean")],
        "rewards, standard deviation within a group": [
            name for name in rewards if name.endswith("/std")
        ],
        **CURVES,
    }
    return [
        line_chart(title, {name: [step.get(name) for step in steps] for name in names}, mark=alarm)
        for title, names in curves.items()
    ]


def position_charts(before, after):
    """The charts of `attention_by_position` as a list of SVGs, before and, unless `after` is None,
    after training."""
    return [
        line_chart(f"{name}: {title}", lines, "token")
        for name, results in (("before", before), ("after", after))
        for title, lines in attention_by_position(results or []).items()
        if lines["text"]
    ]


def attention_by_position(results):
    """Mean attention of each answer token to the region, the rest of the image and text, for right
    and wrong answers.

    Args: results of `evaluate`.
    Returns: {title: {name: list of means by position}}. A position is included if at least a third
    of the answers are that long.
    """
    charts = {}
    for title, correct in (("right answers", 1.0), ("wrong answers", 0.0)):
        answers = [result for result in results if result["correct"] == correct]
        lines = {"the region": [], "the rest of the image": [], "text": []}
        for i in range(max((answer["length"] for answer in answers), default=0)):
            reached = [answer for answer in answers if i < answer["length"]]
            if 3 * len(reached) < len(answers):
                break
            region = fmean(answer["to_region"][i] for answer in reached)
            image = fmean(answer["to_image"][i] for answer in reached)
            for line, value in zip(lines.values(), (region, image - region, 1 - image)):
                line.append(value)
        charts[f"{title} ({len(answers)})"] = lines
    return charts


def line_chart(title, lines, x_label="step", mark=None):
    """Draw a line chart as inline SVG.

    Args: lines, {name: values at x = 1, 2, ...}, with None for a missing value; mark, an x
    and its name (what follows them is ignored), or None.
    Returns: the SVG as a string, or "" if there are no values.
    """
    values = [v for line in lines.values() for v in line if v is not None]
    if not values:
        return ""
    width, height, left, right, top, bottom = 420, 190, 52, 408, 26, 156
    longest = max(len(line) for line in lines.values())
    low, high = min(0.0, *values), max(values)
    high = high if high > low else low + 1

    def point(i, value):
        x = left + (right - left) * (i / max(1, longest - 1))
        return f"{x:.1f},{bottom - (bottom - top) * (value - low) / (high - low):.1f}"

    title, legend = html.escape(title), legend_width(len(lines))
    parts = [
        f'<svg class="chart" viewBox="0 0 {width} {height + 14 * len(lines)}" role="img">',
        f"<title>{title}</title>",
        f'<text x="{left}" y="14" class="title">{title}</text>',
        f'<path class="axis" d="M{left},{top} V{bottom} H{right}"/>',
        f'<text x="{left - 5}" y="{top + 6}" text-anchor="end">{high:.2g}</text>',
        f'<text x="{left - 5}" y="{bottom}" text-anchor="end">{low:.2g}</text>',
        f'<text x="{left}" y="{bottom + 15}">1</text>',
        f'<text x="{right}" y="{bottom + 15}" text-anchor="end">{x_label} {longest}</text>',
    ]
    if mark:
        x, _ = point(mark[0] - 1, low).split(",")
        parts.append(f'<path class="alarm" d="M{x},{top} V{bottom}"/>')
        parts.append(f'<text x="{x}" y="{top - 2}" class="alarm">{mark[1]}</text>')
    for n, (name, line) in enumerate(lines.items()):
        points = " ".join(point(i, v) for i, v in enumerate(line) if v is not None)
        y, style = height + 14 * n, line_style(n)
        parts += [
            f'<polyline {style} points="{points}"/>',
            f'<path {style} d="M{left},{y - 4} h{legend}"/>',
            f'<text x="{left + legend + 6}" y="{y}">{html.escape(name)}</text>',
        ]
    return "".join(parts) + "</svg>"


def line_style(n):
    """The SVG attributes of a chart's line `n`, counted from 0.

    Colors repeat but dash patterns do not, so lines differ even without color. Line 0 is solid,
    line n has a long dash and n dots.
    """
    dashes = " ".join(["10 4", *["2 4"] * n]) if n else "none"
    return f'class="line{n % LINE_COLORS}" stroke-dasharray="{dashes}"'


def legend_width(count):
    """The legend line length that shows the full dash pattern of each of `count` lines."""
    return max(26, 14 + 6 * (count - 1) + 10)  # the longest pattern plus the next long dash


def stack_charts(charts):
    """Several charts stacked vertically in one SVG file."""
    style = (
        "text{font:12px sans-serif}.title{font-weight:bold}"
        ".axis,polyline,[class^=line]{fill:none;stroke:#333}"
        ".line0{stroke:#d55e00;stroke-width:2}.line1{stroke:#0072b2;stroke-width:2}"
    )
    height = 240
    parts = [
        f'<svg y="{height * i}" height="{height - 8}" {chart.removeprefix("<svg")}'
        for i, chart in enumerate(charts)
    ]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="440" height="{height * len(parts)}">'
        f'<style>{style}</style><rect width="100%" height="100%" fill="white"/>'
        f"{''.join(parts)}</svg>"
    )
