"""What a step gives back of each micro-batch."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from ds_cmli.losses import LOSSES


@dataclass
class MicroBatchLosses:
    """Of this rank's pairs, fp32 scalars without graph."""

    index: Tensor  # int64 [B], of its samples in the training set
    total: Tensor  # the weighted loss
    each: dict[str, Tensor]  # by name
    ignored: Tensor  # texts of other pairs, a pair, that are no negatives: of the same picture or caption

    def stacked(self) -> Tensor:
        """Total, each loss and the texts that are no negatives, in this order."""
        return torch.stack([self.total, *self.each.values(), self.ignored])


def by_name(means: list[float], losses: Iterable[str], pairs: int) -> dict[str, float]:
    """Means of `MicroBatchLosses.stacked` over `pairs` pairs, under the names by which they are logged; none of 0."""
    if not pairs:
        return {}
    names = list(losses)
    values = dict(zip(["loss", *(f"loss/{name}" for name in names)], means[:-1], strict=True))
    # Texts of the same picture or caption: a loss with one positive text ignores them, one with several adds them.
    several = {LOSSES[name].several for name in names if LOSSES[name].scores}
    return values | {("added_positives" if each else "ignored_negatives"): round(means[-1] * pairs) for each in several}
