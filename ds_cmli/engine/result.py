"""The losses that a step returns for each micro-batch."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from ds_cmli.config.registry import LOSSES


@dataclass
class MicroBatchLosses:
    """Losses of this rank's pairs in a micro-batch, fp32 scalars without a graph."""

    index: Tensor  # int64 [B], the samples' indices in the training set
    total: Tensor  # the weighted sum of the losses
    each: dict[str, Tensor]  # each loss by name
    # Number per pair of other pairs' texts that are no negatives: same picture or caption.
    ignored: Tensor

    def stacked(self) -> Tensor:
        """One tensor: the total, each loss and `ignored`, in this order."""
        return torch.stack([self.total, *self.each.values(), self.ignored])


def by_name(means: list[float], losses: Iterable[str], pairs: int) -> dict[str, float]:
    """Means of `stacked` losses over `pairs` pairs, by their names in the log; {} for no pairs."""
    if not pairs:
        return {}
    names = list(losses)
    columns = ["loss"] + [f"loss/{name}" for name in names]
    values = dict(zip(columns, means[:-1], strict=True))
    # Texts of the same picture or caption: a loss with one positive ignores them, one with several
    # adds them as such.
    several = {LOSSES[name].several for name in names if LOSSES[name].scores}
    for each in several:
        column = "added_positives" if each else "ignored_negatives"
        values[column] = round(means[-1] * pairs)
    return values
