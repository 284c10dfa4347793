"""Final outputs of a run: the adapter and its card, the results table, pictures, report.html."""

import json
from functools import partial

from analysis.animation import choose_question, mean_map, plot_animation
from analysis.html_report import render_report, unpack_map
from analysis.model_card import model_card, public_name
from analysis.plots import plot_before_after
from analysis.results_table import results_table

CAPTIONS = "before training", "after training"


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
    """Write the HTML report. With both evaluations, also print the table, write the pictures
    (look.png, look.gif and before_after.png), and add the results to the adapter's card.

    Args: run, a RunDirectory; examples, the held-out ones; before, after, results of `evaluate`.
    """
    if before and after:
        print(results_table(before, after))
        pairs = list(zip(before, after))
        rows = [(examples[i], label(pair)) for i, pair in enumerate(pairs) if pair[0]["map"]]
        run.atomic_write("look.png", partial(plot_before_after, rows))
        chosen = choose_question(before, after)
        write_chosen(run, examples[chosen], pairs[chosen])
        run.write_texts({"adapter/README.md": model_card(run.settings, before, after)})
    run.write_texts(render_report(run.folder, examples))


def write_chosen(run, example, pair):
    """Write look.gif and before_after.png of one question. Args: pair, its results."""
    if any("by_word" not in result for result in pair):
        return print("no look.gif and before_after.png: before.json is from an earlier version")
    answers = []
    for answer in label(pair):
        by_word = answer["by_word"]
        maps = [unpack_map(packed) for packed in by_word["maps"]]
        answers.append(answer | by_word | {"maps": maps, "map": mean_map(maps, answer["selected"])})
    run.atomic_write("look.gif", partial(plot_animation, example, answers))
    run.atomic_write("before_after.png", partial(plot_before_after, [(example, answers)]))


def label(pair):
    """The two results of a question with a `caption` added."""
    return [result | {"caption": caption} for result, caption in zip(pair, CAPTIONS)]
