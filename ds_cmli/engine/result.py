"""The losses that a step returns for each micro-batch."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from ds_cmli.config.registry import LOSSES
from ds_cmli.config.schema import LossConfig

# What `Cut.found` holds, in the log.
CUT = ("cut/kept", "cut/bound")


@dataclass
class MicroBatchLosses:
    """Losses of this rank's pairs in a micro-batch, fp32 scalars without a graph."""

    index: Tensor  # int64 [B], the samples' indices in the training set
    total: Tensor  # the weighted sum of the losses
    each: dict[str, Tensor]  # each loss by name
    # Number per pair of other pairs' texts that are no negatives: same picture or caption.
    ignored: Tensor
    cut: Tensor | None = None  # fp32 [2], `Cut.found`, with loss.cmli_cut

    def stacked(self) -> Tensor:
        """One tensor: the total, each loss, `ignored` and `cut`, in this order."""
        losses = torch.stack([self.total, *self.each.values(), self.ignored])
        return losses if self.cut is None else torch.cat([losses, self.cut])


def columns(config: LossConfig) -> int:
    """The number of elements of `MicroBatchLosses.stacked`."""
    return 2 + len(config.weights) + (len(CUT) if config.cmli_cut else 0)


def by_name(means: list[float], losses: Iterable[str], pairs: int) -> dict[str, float]:
    """Means of `stacked` losses over `pairs` pairs, by their names in the log; {} for no pairs."""
    if not pairs:
        return {}
    names = list(losses)
    count = 1 + len(names)
    ignored, left_out = means[count], means[count + 1 :]
    named = ["loss"] + [f"loss/{name}" for name in names]
    values = dict(zip(named, means[:count], strict=True))
    # Texts of the same picture or caption: a loss with one positive ignores them, one with several
    # adds them as such.
    several = {LOSSES[name].several for name in names if LOSSES[name].scores}
    for each in several:
        column = "added_positives" if each else "ignored_negatives"
        values[column] = round(ignored * pairs)
    return values | dict(zip(CUT, left_out, strict=False))
