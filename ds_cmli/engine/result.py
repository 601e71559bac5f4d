"""What a step gives back of each micro-batch."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class MicroBatchLosses:
    """Of this rank's pairs, fp32 scalars without graph."""

    index: Tensor  # int64 [B], of its samples in the training set
    total: Tensor  # the weighted loss
    each: dict[str, Tensor]  # by name
    ignored: Tensor  # negatives, a pair, that were ignored as captions of the same picture

    def stacked(self) -> Tensor:
        """Total, each loss and the ignored negatives, in this order."""
        return torch.stack([self.total, *self.each.values(), self.ignored])
