"""report.html: a run on one page, in a single file. This module collects the data and draws the
charts for `report_template.html`. Imports only Pillow and the standard library."""

import base64
import html
import io
import json
import re
from pathlib import Path
from statistics import fmean

from analysis.results_table import results_table
from runtime.run_folder import join_flags
from runtime.settings import FIELDS

# An attention value is stored as one of these 64 characters.
LEVELS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz-_"
LINE_COLORS = 6  # the classes line0 to line5 of report_template.html
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
    settings = settings_command(config)
    table = results_table(before, after or before) if before else ""
    parts = {
        "STATUS": html.escape(
            f"{Path(config['model_name_or_path']).name}, {config['dataset']}: {status}"
        ),
        "SETTINGS": html.escape(settings),
        "TABLE": html.escape(table),
        "METRIC_CHARTS": "\n".join(metric_charts(steps)),
        "POSITION_CHARTS": "\n".join(charts),
        "LEVELS": LEVELS,
        # An example may contain "</script>".
        "DATA": json.dumps(example_data(examples, before, after)).replace("<", "\\u003c"),
    }
    template = (Path(__file__).parent / "report_template.html").read_text(encoding="utf-8")
    page = re.sub("@([A-Z_]+)@", lambda match: parts[match[1]], template)
    return {"report.html": page, "response.svg": stack_charts(charts)}


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


def read_json(path):
    """The content of a JSON file, or None if it does not exist."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def read_metrics(path):
    """The rows of metrics.jsonl, or [] if it does not exist."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [json.loads(line) for line in lines]


def example_data(examples, before, after):
    """The page's data for every example whose results contain maps, a list of dicts for JSON."""
    data = []
    for i, result in enumerate(before or []):
        if not result["page"]:
            continue
        example = examples[i]
        results = [
            results[i]["page"] | {key: results[i][key] for key in ("selected", "correct")}
            for results in (before, after)
            if results
        ]
        data.append(
            {
                "image": image_as_url(example.image),
                "size": example.image.size,
                "boxes": example.boxes,
                "question": example.question,
                "answer": example.answer,
                "results": results,
            }
        )
    return data


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
    """The attention map (N,) in a result of `pack_map`, to the nearest level."""
    largest, levels = packed
    return [largest * (LEVELS.index(level) / 63) ** 2 for level in levels]


def metric_charts(steps):
    """The training curves of all logged rewards and of CURVES, as a list of SVGs.

    Args: steps, the rows of metrics.jsonl.
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
        line_chart(title, {name: [step.get(name) for step in steps] for name in names})
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


def line_chart(title, lines, x_label="step"):
    """Draw a line chart as inline SVG.

    Args: lines, {name: values at x = 1, 2, ...}, with None for a missing value.
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
