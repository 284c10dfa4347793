"""What a run looks at and writes: evaluation, metrics, the probe, pictures and the HTML report."""
