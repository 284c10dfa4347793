"""Final outputs of a run: the adapter and its card, the results table, look.png and report.html."""

import json
from functools import partial

from analysis.html_report import render_report
from analysis.model_card import model_card, public_name
from analysis.plots import plot_before_after
from analysis.results_table import results_table


def save_adapter(run, model):
    """Write the folder adapter/. Its card has no results yet; `write_report` adds them.

    Args: run, a RunDirectory; model, the PEFT model. Raises: InputError if it cannot be written.
    """

    def write(folder):
        model.save_pretrained(folder)
        path = folder / "adapter_config.json"
        config = json.loads(path.read_text("utf-8"))
        # PEFT stores the path that the model was loaded from.
        config["base_model_name_or_path"] = public_name(run.settings["model_name_or_path"])
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", "utf-8")
        (folder / "README.md").write_text(model_card(run.settings), "utf-8")

    run.atomic_write("adapter", write)


def write_report(run, examples, before=None, after=None):
    """Write the HTML report. With both evaluations, also print the table, write look.png and add
    the results to the adapter's card.

    Args: run, a RunDirectory; examples, the held-out ones; before, after, results of `evaluate`.
    """
    if before and after:
        print(results_table(before, after))
        run.atomic_write("look.png", partial(plot_before_after, examples, before, after))
        run.write_texts({"adapter/README.md": model_card(run.settings, before, after)})
    run.write_texts(render_report(run.folder, examples))
