"""`compare`: the curves, results and settings of several runs on one page. Does not load torch."""

import html
from pathlib import Path

from analysis.html_report import fill_template, line_chart, read_json, read_metrics
from analysis.results_table import table_rows
from config import InputError
from runtime.settings import FIELDS, load_saved, stored_model

NOT_COMPARED = "output_dir", "resume"  # settings


def compare_runs(runs, output):
    """Write a page that compares runs, finished or not.

    Args: runs, their folders; output, the path of the page.
    Returns: the exit code. Raises: InputError for a folder without a run, damaged files, fewer than
    two runs, or a page that cannot be written.
    """
    path = Path(output)
    if path.suffix != ".html":
        raise InputError(f"--output {output}: must end in .html")
    folders = {Path(run).resolve(): Path(run) for run in runs}
    if len(folders) < 2:
        raise InputError("compare needs at least two different runs (see --help)")
    loaded = [read_run(folder) for folder in folders.values()]
    for run, name in zip(loaded, short_names([run["folder"] for run in loaded])):
        run["name"] = name
    charts, constant = draw_curves(loaded)
    parts = {
        "TITLE": html.escape("sayo-mini: " + ", ".join(run["name"] for run in loaded)),
        "RUNS": html_table(*list_runs(loaded)),
        "SETTINGS": settings_section(loaded),
        "RESULTS": html_table(*results_rows(loaded)),
        "CHARTS": "\n".join(charts),
        "CONSTANT": html.escape(constant),
    }
    try:
        path.write_text(fill_template("compare_template.html", parts), encoding="utf-8")
    except OSError as error:
        raise InputError(f"--output {output}: {error.strerror}") from None
    print(f"wrote {output}: {len(loaded)} runs, {len(charts)} curves")
    return 0


def read_run(folder):
    """The content of a run's folder: a dict with folder, settings, steps, before and after; the
    last two are None if they do not exist. Raises: InputError."""
    settings = load_saved(folder) if folder.is_dir() else None
    if settings is None:
        problem = "config.json is missing" if folder.is_dir() else "there is no such folder"
        raise InputError(f"{folder}: no run found ({problem})")
    path = folder / "metrics.jsonl"
    try:
        steps = read_metrics(path)
        for row in steps:
            row.items()
        run = {"folder": folder, "settings": settings, "steps": steps}
        for name in ("before", "after"):
            path = folder / f"{name}.json"
            run[name] = read_json(path)
        before, after = run["before"], run["after"]
        path = folder / ("after.json" if after else "before.json")
        run["table"] = table_rows(before, after or before) if before else {}
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is damaged ({error}): compare the other runs") from None
    return run


def short_names(folders):
    """The last part of each path, or the paths themselves if that is ambiguous."""
    names = [folder.name or str(folder.resolve()) for folder in folders]
    return names if len(set(names)) == len(names) else [str(folder) for folder in folders]


def list_runs(runs):
    """A table with a row per run. Returns: (header, rows) of text."""
    rows = []
    for run in runs:
        steps, most = len(run["steps"]), run["settings"].get("max_steps", "?")
        state = "finished" if run["after"] else "not finished"
        rows.append([run["name"], str(run["folder"]), f"{steps} of {most} steps, {state}"])
    return ["run", "folder", "state"], rows


def settings_section(runs):
    """The settings that differ, as an HTML table."""
    rows = []
    for name in FIELDS:
        values = [show_setting(name, run["settings"].get(name, "-")) for run in runs]
        if name not in NOT_COMPARED and len(set(values)) > 1:
            rows.append([f"--{name}", *values])
    if not rows:
        return "<p>All settings are the same.</p>"
    return html_table(["setting", *(run["name"] for run in runs)], rows)


def show_setting(name, value):
    if name == "model_name_or_path":
        value = stored_model(value)  # "tiny", not its path on this machine
    return str(value) or "none"


def results_rows(runs):
    """The results of all runs side by side. Returns: (header, rows) of text."""
    header, titles = ["held-out questions"], {}
    for run in runs:
        header += [f"{run['name']}: before", f"{run['name']}: after"]
        titles |= {metric: row[0] for metric, row in run["table"].items()}
    rows = [["number of questions"], *([title] for title in titles.values())]
    for run in runs:
        count = [str(len(run[name])) if run[name] else "-" for name in ("before", "after")]
        rows[0] += count
        for row, metric in zip(rows[1:], titles):
            _, before, after, _ = run["table"].get(metric, ("", "-", "-", ""))
            row += [before, after if run["after"] else "-"]
    return header, rows


def draw_curves(runs):
    """A chart of every metric, with a line per run.

    Returns: (list of SVGs, a sentence that lists the metrics that never change).
    """
    names = dict.fromkeys(name for run in runs for step in run["steps"] for name in step)
    charts, constant = [], []
    for metric in [name for name in names if name != "step"]:
        lines = {run["name"]: [number(step.get(metric)) for step in run["steps"]] for run in runs}
        values = {value for line in lines.values() for value in line if value is not None}
        if len(values) == 1:
            constant.append(f"{metric} {values.pop():g}")
        elif values:
            charts.append(line_chart(metric, lines))
    return charts, "Constant in all runs: " + ", ".join(constant) + "." if constant else ""


def number(value):
    """The value if it can be drawn, else None; TRL also logs text."""
    return value if type(value) in (int, float) else None


def html_table(header, rows):
    """An HTML table of text. The first cell of a row is its header."""
    head = "".join(f'<th scope="col">{html.escape(cell)}</th>' for cell in header)
    body = ""
    for title, *cells in rows:
        cells = "".join(f"<td>{html.escape(cell)}</td>" for cell in cells)
        indent = ' class="indented"' * title.startswith(" ")
        body += f'<tr><th scope="row"{indent}>{html.escape(title.strip())}</th>{cells}</tr>'
    return f'<div class="scroll" tabindex="0"><table><tr>{head}</tr>{body}</table></div>'
