"""adapter/README.md: what was trained, on which data, and how well it works. It names no folder of
this machine. Imports only the standard library."""

import json
import re
from pathlib import Path

from analysis.results_table import results_table
from config import parse_weights

HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")
CARD = """\
---
{front_matter}
---
# LoRA adapter for {base}

Trained with sayo-mini, a reference implementation of [SAYO](https://arxiv.org/abs/2602.08241): GRPO
with a reward for looking at the region of the image that contains the answer.

| | |
|---|---|
{settings}

## Results

{results}

## How to load it

```python
from peft import PeftModel
from transformers import AutoModelForImageTextToText

base = {quoted_base}
adapter = "."  # the folder of this file
instruction = {instruction}  # appended to every question in training

model = AutoModelForImageTextToText.from_pretrained(base, dtype="auto")
model = PeftModel.from_pretrained(model, adapter)
```

`docs/use_your_adapter.md` in the repository of sayo-mini shows how to ask a question, and how to
merge the adapter into the base model.

## License

The license of the base model, {base}, applies.
"""


def model_card(settings, before=None, after=None):
    """The text of adapter/README.md. It depends on nothing else, so that a resumed run writes the
    same card.

    Args: settings, those of the run, a dict as in config.json; before, after, results of
    `evaluate`, or None.
    """
    base = public_name(settings["model_name_or_path"])
    front_matter = ["library_name: peft", "pipeline_tag: image-text-to-text"]
    if HUB_NAME.fullmatch(base):
        front_matter.insert(0, f"base_model: {base}")
    results = "This run was not evaluated."
    if before and after:
        results = f"```\n{results_table(before, after)}\n```"
    rows = (f"| {name} | {escape(text)} |" for name, text in card_rows(settings, base).items())
    return CARD.format(
        front_matter="\n".join(front_matter),
        base=base,
        settings="\n".join(rows),
        results=results,
        quoted_base=quote(base),
        instruction=quote(settings["instruction"]),
    )


def card_rows(settings, base):
    """The table of a card: {name: text}."""
    weights, start = parse_weights(settings["reward_weights"]), {}
    if settings["adapter"]:
        before = "*before* means with it" if settings["max_steps"] else "*before* means without it"
        start = {"started from": f"another adapter; {before}"}
    return {
        "base model": base + ", in 4 bits (NF4)" * settings["load_in_4bit"],
        "data": data_names(settings),
        "reward": " + ".join(f"{w:g} x {name}" for name, w in weights.items() if w),
        "attention reward": "layers {layers}, heads {heads}, alignment {alignment}, "
        "the share {token_fraction:g} of tokens with the highest entropy".format_map(settings),
        "format reward": "{format_lengths} tokens (minimum, maximum)".format_map(settings),
        "steps": str(settings["max_steps"]),
        "questions per step": str(settings["prompts_per_step"]),
        "completions per question": str(settings["num_generations"]),
        "learning rate": "{learning_rate:g}, {lr_scheduler_type}".format_map(settings),
        "LoRA": "rank {lora_r}, alpha {lora_alpha}".format_map(settings),
        "images": "at most {max_pixels} pixels".format_map(settings),
        "seed": str(settings["seed"]),
        **start,
    }


def public_name(model):
    """The name of a model without the folders of this machine: the hub name or "tiny" as it is,
    otherwise the last part of the path."""
    return model if HUB_NAME.fullmatch(model) else Path(model).resolve().name


def data_names(settings):
    """The data sets of a run, as text; files without their folders."""
    dataset, mix = settings["dataset"], settings["mix"]
    names = [dataset] if Path(dataset).exists() else dataset.split("+")
    return " + ".join(Path(name).name for name in names) + f", shares {mix}" * bool(mix)


def escape(text):
    """Text for a cell of a Markdown table."""
    return " ".join(text.replace("|", "\\|").split())


def quote(text):
    """Text as a Python string with double quotes."""
    return json.dumps(text, ensure_ascii=False)
