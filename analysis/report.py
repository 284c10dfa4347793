"""What a run shows in the end: the table, look.png and report.html."""

from functools import partial

from analysis.html_report import render_report
from analysis.plots import plot_before_after
from analysis.results_table import results_table


def write_report(run, examples, before=None, after=None):
    """Write the pictures and the HTML report of a run; with both evaluations, print their table.

    Args: run, its RunDirectory; examples, the held-out ones; before, after, see `evaluate`.
    """
    if before and after:
        print(results_table(before, after))
        run.atomic_write("look.png", partial(plot_before_after, examples, before, after))
    run.write_texts(render_report(run.folder, examples))
