"""Final outputs of a run: the results table, look.png and report.html."""

from functools import partial

from analysis.html_report import render_report
from analysis.plots import plot_before_after
from analysis.results_table import results_table


def write_report(run, examples, before=None, after=None):
    """Write the HTML report. With both evaluations, also print the table and write look.png.

    Args: run, a RunDirectory; examples, the held-out ones; before, after, results of `evaluate`.
    """
    if before and after:
        print(results_table(before, after))
        run.atomic_write("look.png", partial(plot_before_after, examples, before, after))
    run.write_texts(render_report(run.folder, examples))
