"""Data sets and pretrained models. `load_datasets` opens the data sets of a run and imports only
the readers that it needs."""

import logging
from pathlib import Path

import torch

from config import InputError, is_tiny

# Set before bitsandbytes loads: it warns about a kernel that is not used here.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def load_datasets(cfg):
    """The (training, held-out) data sets of `--dataset`. Prints how many examples were skipped.
    Raises: InputError."""
    if cfg.dataset == "scenes":
        from sources.scenes import LARGE_SCENES, Scenes

        style = {} if is_tiny(cfg.model_name_or_path) else LARGE_SCENES
        count = max(1, cfg.max_steps * cfg.prompts_per_step)
        return Scenes("train", count, cfg.seed, **style), Scenes("test", cfg.eval_examples, **style)
    from torch.utils.data import ConcatDataset

    from sources.mixture import Mixture, mix_shares

    names = [cfg.dataset] if Path(cfg.dataset).exists() else cfg.dataset.split("+")
    shares, splits = mix_shares(cfg.mix, names), []
    for name, share in zip(names, shares):
        dataset = open_dataset(name, cfg, [] if cfg.skip_bad_examples else None)
        print(*dataset.notes, sep="\n", end="\n" * bool(dataset.notes))
        splits.append(dataset.split(round(cfg.eval_examples * share)))
    if len(splits) == 1:
        return splits[0]
    train_sets, eval_sets = zip(*splits)
    return Mixture(train_sets, shares), ConcatDataset(eval_sets)


def open_dataset(name, cfg, problems=None):
    """The data set called `name`, or in the file `name`. Args: problems, see `AnnotatedDataset`.
    Raises: InputError.

    To add a format, write a reader in `sources/` and add it here, see docs/extending.md.
    """
    if name == "gqa":
        from sources.gqa import Gqa

        return Gqa(cfg.data_dir, cfg.allow_absolute_paths, problems)
    if name == "refocus":
        from sources.refocus import ReFocus

        return ReFocus(problems)
    if name == "scenes":
        raise InputError("--dataset: generated scenes cannot be mixed with other data sets")
    from sources.jsonl import JsonLines

    return JsonLines(name, cfg.allow_absolute_paths, problems)


def step_examples(train_set, step, cfg):
    """The Examples of a training step, a list of `prompts_per_step`."""
    order = range(step * cfg.prompts_per_step, (step + 1) * cfg.prompts_per_step)
    return [train_set[epoch_index(k, len(train_set), cfg.seed)] for k in order]


def epoch_index(k, n, seed):
    """Index of the k-th example of an endless stream; each epoch is a new permutation of n."""
    epoch, i = divmod(k, n)
    generator = torch.Generator().manual_seed(seed + 1000003 * epoch)
    return torch.randperm(n, generator=generator)[i].item()
