"""The softmax over all images for each text, computed from scores that come in blocks of image rows.

Shapes: R rows of a block, G texts.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from ds_cmli.distributed import collectives
from ds_cmli.distributed import process_group as distributed


class ColumnStatistics:
    """log(sum(exp)) of each column over the rows of all blocks and ranks, and the loss's gradient with respect to it.

    It may be requested any number of times per block; the n-th request must be for the same scores in every block.
    """

    def __init__(self) -> None:
        self.lse: list[Tensor] = []  # [G] each
        self.gradients: list[Tensor] = []  # [G] each
        self.leaves: list[Tensor] = []  # those returned for the current block, [G] each
        self.asked = 0  # number of requests

    def collect(self, logits: Tensor) -> Tensor:
        """First pass: add a block's logits, [R, G]. Returns zeros, [G], that only serve to find the loss's gradient."""
        n, self.asked = self.asked, self.asked + 1
        lse = logits.detach().logsumexp(0)
        if n == len(self.lse):
            self.lse.append(lse)
            self.gradients.append(torch.zeros_like(lse))
        else:
            self.lse[n] = torch.logaddexp(self.lse[n], lse)
        self.leaves.append(torch.zeros_like(lse, requires_grad=True))
        return self.leaves[n]

    def end_block(self, loss: Tensor) -> None:
        """End a block of the first pass: add the gradients of its weighted and scaled loss."""
        if self.leaves:
            for total, grad in zip(self.gradients, torch.autograd.grad(loss, self.leaves), strict=True):
                total += grad
        self.leaves, self.asked = [], 0

    def merge(self) -> None:
        """End the first pass: combine the statistics of all ranks. Collective."""
        self.lse = [collectives.logsumexp_over_ranks(lse) for lse in self.lse]  # collective
        if distributed.world_size() > 1:
            for grad in self.gradients:
                dist.all_reduce(grad)  # collective; each rank's loss may use every column

    def known(self, logits: Tensor) -> Tensor:
        """Second pass: the log(sum(exp)) of all rows, [R, G] -> [G], with the gradient for this block's logits."""
        n = self.asked % len(self.lse)
        self.asked += 1
        return _KnownLogSumExp.apply(logits, self.lse[n], self.gradients[n])  # type: ignore[no-untyped-call]


class _KnownLogSumExp(torch.autograd.Function):
    """Returns `lse`; its backward uses `grad`, the gradient of the losses of all rows, not the one of this block."""

    @staticmethod
    def forward(ctx, logits, lse, grad):
        ctx.save_for_backward(logits, lse, grad)
        return lse.clone()

    @staticmethod
    def backward(ctx, block_grad):
        logits, lse, grad = ctx.saved_tensors
        return (logits - lse).exp_().mul_(grad), None, None
