"""adapter/README.md: what was trained, on which data, and how well it works. It names no folder of
this machine."""

import html
from pathlib import Path

from config import parse_weights
from evaluate import results_text

CARD = """\
---
{base_model}library_name: peft
pipeline_tag: image-text-to-text
---
# LoRA adapter for {base}

From sayo-mini, a reference implementation of [SAYO](https://arxiv.org/abs/2602.08241): GRPO with a
reward for looking at a region of the image.

| | |
|---|---|
| base model | {base}{quantized} |
| data | {data} |
| reward | {reward} |
| attention | {attention}, alignment {alignment}, the share \
{token_fraction:g} of tokens with the highest entropy |
| region | {where} |
| images | at most {max_pixels:,} pixels |
| training | {max_steps} steps of {prompts_per_step} questions with {num_generations} completions \
each; learning rate {learning_rate:g}, {lr_scheduler_type}; seed {seed}{best} |
{start}
## Results

{results}

## How to load it

```python
from peft import PeftModel
from transformers import AutoModelForImageTextToText

adapter = "."  # the folder of this file
instruction = {instruction!r}  # appended to every question in training

model = AutoModelForImageTextToText.from_pretrained({base!r}, dtype="auto")
model = PeftModel.from_pretrained(model, adapter)
```

`docs/use_your_adapter.md` in the repository of sayo-mini shows how to ask a question, and how to
merge the adapter into the base model. The license of the base model, {base}, applies.
"""


PLACEBO = "a placebo: the boxes, rolled by half the image"


def model_card(settings, before=None, after=None):
    """The text of adapter/README.md. A resumed run writes the same card.

    Args: settings, those of the run, a dict as in config.json; before, after, results of
    `evaluate`, or None.
    """
    model = settings["model_name_or_path"]
    base = plain(Path(model).resolve().name) if Path(model).exists() else model
    weights = parse_weights(settings["reward_weights"])
    start, results = "", "This run was not evaluated."
    data = Path(settings["dataset"]).name if settings["max_steps"] else "none, only evaluated"
    if settings["eval_dataset"]:
        data += f"; evaluated on {Path(settings['eval_dataset']).name}"
    if settings["adapter"]:
        meaning = "with it" if settings["max_steps"] else "without it"
        start = f"| started from | another adapter; *before* means {meaning} |\n"
    if before and after:
        results = f"```\n{results_text(before, after)}\n```"
    parts = {
        "base": base,
        "base_model": f"base_model: {base}\n" if "/" in base else "",
        "quantized": ", in 4 bits (NF4)" if settings["load_in_4bit"] else "",
        "data": plain(data),
        "reward": " + ".join(f"{weight:g} x {name}" for name, weight in weights.items() if weight),
        "attention": attention_source(settings),
        "where": PLACEBO if settings["region"] == "rolled" else "the boxes of the data",
        "best": "; the adapter of the best steps (--keep_best)" if settings["keep_best"] else "",
        "start": start,
        "results": results,
    }
    return CARD.format(**settings | parts)


def attention_source(settings):
    """The layers and heads whose attention counts, in words."""
    layers, heads = settings["layers"], settings["heads"]
    layers = {"-1": "last layer", "all": "all layers"}.get(layers, f"layers {layers}")
    return f"{layers}, {'all heads' if heads == 'all' else f'heads {heads}'}"


def plain(name):
    """The name of a file as a cell of a Markdown table, without HTML."""
    return html.escape(" ".join(name.split())).replace("|", "\\|")
