"""What a run measures and shows: evaluation, metrics, alarms, pictures and the HTML report."""
