"""Warnings about suspicious metrics of a training step."""

from tqdm import tqdm

ALARMS = {  # metric -> (threshold, what it means)
    "frac_reward_zero_std": (
        0.9,
        "all completions of a question get equal reward, so there is nothing to learn",
    ),
    "completions/seq_rep_3": (0.3, "completions repeat the same words"),
    "completions/unclosed_tags": (0.3, "completions open <answer> without closing it"),
    "completions/clipped_ratio": (0.5, "most completions are cut off at --max_completion_length"),
}


def alarms(row):
    """The signs of reward hacks and dead signals in a row of metrics.jsonl, {metric: message}."""
    return {
        name: f"{name} {row[name]:.2f}: {why}"
        for name, (minimum, why) in ALARMS.items()
        if row[name] >= minimum
    }


def print_alarms(step, row, warned):
    """Print each alarm once per run. `warned` is the set of metrics already reported."""
    for name, message in alarms(row).items():
        if name not in warned:
            tqdm.write(f"step {step}: {message}")
        warned.add(name)
