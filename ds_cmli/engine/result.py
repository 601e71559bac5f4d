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
    ignored: Tensor  # texts of other pairs, a pair, that are no negatives: of the same picture or caption

    def stacked(self) -> Tensor:
        """Total, each loss and the texts that are no negatives, in this order."""
        return torch.stack([self.total, *self.each.values(), self.ignored])
