"""A training step that runs out of GPU memory is repeated with a smaller micro-batch."""

from tqdm import tqdm


def halve_micro_batch(vlm, cfg, run):
    """Halve the micro-batch after running out of GPU memory, once per process. Returns: False if it
    was done before, is impossible, or if updates of the step may already have been applied."""
    size = cfg.completions_per_forward or cfg.num_generations
    if run.memory_reduced or size == 1 or cfg.num_iterations > 1:
        return False
    run.memory_reduced = True
    vlm.completions_per_forward = cfg.completions_per_forward = size // 2
    run.write_config(cfg)  # a resumed run keeps it
    change = f"retrying the step with --completions_per_forward {size // 2}"
    tqdm.write(f"step {run.step + 1}: out of GPU memory; {change}")
    return True
