"""Several data sets as one, as in the paper: 80 % GQA, 20 % ReFocus."""

import math

from torch.utils.data import Dataset

from config import InputError


class Mixture(Dataset):
    """Several data sets, mixed by share.

    An epoch contains every example at least once; data sets that are short for their share repeat.
    `[i]` depends only on i, so a resumed run sees the same examples.

    Args: datasets, a list; shares, their fractions, which add up to 1.
    """

    def __init__(self, datasets, shares):
        self.datasets = datasets
        length = max(len(dataset) / share for dataset, share in zip(datasets, shares))
        self.counts = [round(length * share) for share in shares]  # examples per epoch

    def __len__(self):
        return sum(self.counts)

    def __getitem__(self, index):
        for dataset, count in zip(self.datasets, self.counts):
            if index < count:
                return dataset[index % len(dataset)]
            index -= count
        raise IndexError(index)


def mix_shares(text, names):
    """The shares in `text`, e.g. "0.8,0.2", scaled to add up to 1. `text` is ignored for a single
    data set. Raises: InputError unless every name has a share of at least a thousandth."""
    try:
        shares = [1.0] if len(names) == 1 else [float(share) for share in text.split(",")]
    except ValueError:
        shares = []
    total = sum(shares)
    usable = all(0 < share < math.inf and share >= 0.001 * total for share in shares)
    if len(shares) != len(names) or not usable:
        raise InputError(
            f"--mix {text!r}: needs one share per data set ({', '.join(names)}), e.g. 0.8,0.2"
        )
    return [share / total for share in shares]
