"""The softmax over the images of each text, where scores of these images come in blocks of rows.

Shapes: R rows of a block, G texts.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from ds_cmli.distributed import process_group as distributed


class ColumnStatistics:
    """log(sum(exp)) of each column over the rows of all blocks and ranks, and the loss's gradient by it.

    A loss asks for it any number of times; the n-th time is the same of every block.
    """

    def __init__(self) -> None:
        self.lse: list[Tensor] = []  # [G] each
        self.gradients: list[Tensor] = []  # [G] each
        self.leaves: list[Tensor] = []  # of the present block
        self.asked = 0

    def collect(self, logits: Tensor) -> Tensor:
        """[R, G] -> [G], of which only the gradient has a meaning."""
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
        """Add the gradients of the block whose loss this is, weighted and scaled."""
        if self.leaves:
            for total, grad in zip(self.gradients, torch.autograd.grad(loss, self.leaves), strict=True):
                total += grad
        self.leaves, self.asked = [], 0

    def merge(self) -> None:
        """Over ranks. Collective."""
        self.lse = [distributed.logsumexp_over_ranks(lse) for lse in self.lse]  # collective
        if distributed.world_size() > 1:
            for grad in self.gradients:
                dist.all_reduce(grad)  # collective: every rank's loss may use every column

    def known(self, logits: Tensor) -> Tensor:
        """[R, G] -> [G], now that it is known."""
        n = self.asked % len(self.lse)
        self.asked += 1
        return _KnownLogSumExp.apply(logits, self.lse[n], self.gradients[n])  # type: ignore[no-untyped-call]


class _KnownLogSumExp(torch.autograd.Function):
    """The logits' gradient follows from all rows' losses, not from this block's alone."""

    @staticmethod
    def forward(ctx, logits, lse, grad):
        ctx.save_for_backward(logits, lse, grad)
        return lse.clone()

    @staticmethod
    def backward(ctx, block_grad):
        logits, lse, grad = ctx.saved_tensors
        return (logits - lse).exp_().mul_(grad), None, None
