"""report.html: one file that shows a run to a person. The page itself is `page.html`; here its data is gathered."""

import base64
import html
import io
import json
from pathlib import Path
from statistics import fmean as mean

from look import table

LEVELS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz-_"  # 64: one character a cell
CURVES = {  # title -> metrics of metrics.jsonl drawn together
    "rewards (mean of a step)": ["rewards/attention/mean", "rewards/format/mean", "rewards/accuracy/mean"],
    "standard deviation within a group": ["rewards/attention/std", "rewards/format/std", "rewards/accuracy/std"],
    "AUROC of the samples' attention": ["attention/auroc"],
    "entropy, nats": ["entropy"],
    "tokens of an answer": ["completions/mean_length"],
    "KL from the model before training, nats a token": ["kl"],
}
DASHES = ("", "7 3", "2 3")  # lines differ without colour


def pack_map(attention):
    """One map as text: its largest value, and one of `LEVELS` for every cell, the square root of its share of that."""
    top = max(max(attention), 1e-12)
    return [round(top, 5), "".join(LEVELS[round(63 * (max(0.0, a) / top) ** 0.5)] for a in attention)]


def chart(title, lines, x_label="step"):
    """A line chart as inline SVG. `lines`: name -> values, at x = 1, 2, ...; None where there is none."""
    width, height, left, right, ground = 420, 190, 52, 408, 156
    longest = max((len(values) for values in lines.values()), default=0)
    numbers = [v for values in lines.values() for v in values if v is not None]
    if not numbers:
        return ""
    low, high = min(0.0, *numbers), max(numbers)
    high = high if high > low else low + 1

    def at(i, v):
        x = left + (right - left) * (i / max(1, longest - 1))
        return f"{x:.1f},{ground - (ground - 26) * (v - low) / (high - low):.1f}"

    parts = [f'<svg class="chart" viewBox="0 0 {width} {height + 14 * len(lines)}" role="img">'
             f"<title>{html.escape(title)}</title>",
             f'<text x="{left}" y="14" class="title">{html.escape(title)}</text>',
             f'<path class="axis" d="M{left},26 V{ground} H{right}"/>',
             f'<text x="{left - 5}" y="32" text-anchor="end">{high:.2g}</text>',
             f'<text x="{left - 5}" y="{ground}" text-anchor="end">{low:.2g}</text>',
             f'<text x="{left}" y="{ground + 15}">1</text>',
             f'<text x="{right}" y="{ground + 15}" text-anchor="end">{x_label} {longest}</text>']  # fmt: skip
    for n, (name, values) in enumerate(lines.items()):
        points = " ".join(at(i, v) for i, v in enumerate(values) if v is not None)
        y, style = height + 14 * n, f'class="line{n}" stroke-dasharray="{DASHES[n % 3]}"'
        parts += [f'<polyline {style} points="{points}"/>', f'<path {style} d="M{left},{y - 4} h26"/>',
                  f'<text x="{left + 32}" y="{y}">{html.escape(name)}</text>']  # fmt: skip
    return "".join(parts) + "</svg>"


def response(results):
    """Attention along the response: to the region, the rest of the image, and text, for each token; right and wrong
    answers apart. Returns: {title: {name: means by token}}; a position counts while a third of the answers reach it."""
    found = {}
    for title, wanted in (("right answers", 1.0), ("wrong answers", 0.0)):
        rows = [r for r in results if r["correct"] == wanted]
        lines = {"the region": [], "the rest of the image": [], "text": []}
        for i in range(max((r["length"] for r in rows), default=0)):
            here = [(r["to_region"][i], r["to_image"][i]) for r in rows if i < r["length"]]
            if 3 * len(here) < len(rows):
                break
            inside, image = (mean(values) for values in zip(*here))
            for line, value in zip(lines.values(), (inside, image - inside, 1 - image)):
                line.append(value)
        found[f"{title} ({len(rows)})"] = lines
    return found


def response_charts(before, after):
    """The charts of `response`, as {title: svg}."""
    sides = {"before": before} | ({"after": after} if after else {})
    return {f"{side}, {title}": chart(f"{side}: {title}", lines, "token") for side, results in sides.items()
            for title, lines in response(results).items() if lines["text"]}  # fmt: skip


def pages(folder, examples):
    """report.html and response.svg of what the run has left in its folder so far, as {name: text}."""
    folder = Path(folder)

    def read(name):
        return json.loads((folder / name).read_text()) if (folder / name).exists() else None

    before, after, config = read("before.json"), read("after.json"), read("config.json")
    steps = []
    if (folder / "metrics.jsonl").exists():
        steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    charts = [chart(title, {name: [step.get(name) for step in steps] for name in names})
              for title, names in CURVES.items()]  # fmt: skip
    along = response_charts(before, after) if before else {}
    shown = [i for i, row in enumerate(before or []) if row["page"]]
    data = [{"image": as_url(examples[i].image), "size": examples[i].image.size, "boxes": examples[i].boxes,
             "question": examples[i].question, "answer": examples[i].answer,
             "sides": [row[i]["page"] | {"selected": row[i]["selected"], "correct": row[i]["correct"]}
                       for row in (before, after) if row]} for i in shown]  # fmt: skip
    status = f"{len(steps)} of {config['max_steps']} steps" + ("" if after else ": not finished")
    settings = " ".join(f"--{name} {value}" for name, value in config.items())
    parts = {
        "STATUS": html.escape(f"{Path(config['model_name_or_path']).name}, {config['dataset']}: {status}"),
        "SETTINGS": html.escape(settings), "TABLE": html.escape(table(before, after or before) if before else ""),
        "CHARTS": "\n".join(charts), "RESPONSE": "\n".join(along.values()), "LEVELS": LEVELS,
        "DATA": json.dumps(data).replace("<", "\\u003c"),
    }  # fmt: skip
    page = (Path(__file__).parent / "page.html").read_text()
    for name, text in parts.items():
        page = page.replace(f"@{name}@", text)
    return {"report.html": page, "response.svg": stacked(along.values())}


def stacked(charts):
    """Several charts as one SVG file, one below the other."""
    style = ("text{font:12px sans-serif}.title{font-weight:bold}.axis,polyline,[class^=line]{fill:none;stroke:#333}"
             ".line0{stroke:#d55e00;stroke-width:2}.line1{stroke:#0072b2;stroke-width:2}")  # fmt: skip
    parts = [f'<svg y="{240 * i}" height="232" {svg[4:]}' for i, svg in enumerate(charts)]
    return (f'<svg xmlns="http://www.w3.org/2000/svg" width="440" height="{240 * len(parts)}"><style>{style}</style>'
            f'<rect width="100%" height="100%" fill="white"/>{"".join(parts)}</svg>')  # fmt: skip


def as_url(image, longest=336):
    """An image as a data URL: lossless if small, else JPEG."""
    image = image.convert("RGB")
    small = max(image.size) <= 128
    image.thumbnail((longest, longest))
    file = io.BytesIO()
    image.save(file, "PNG") if small else image.save(file, "JPEG", quality=80)
    return f"data:image/{'png' if small else 'jpeg'};base64,{base64.b64encode(file.getvalue()).decode()}"
