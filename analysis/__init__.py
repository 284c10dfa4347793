"""Evaluation, metrics, alarms, images and the HTML report of a run."""
