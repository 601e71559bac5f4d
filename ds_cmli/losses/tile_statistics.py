"""Softmaxes over all texts and over all images, from scores that come in tiles.

Shapes: R images and T texts of a tile.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ds_cmli.cmli import collectives
from ds_cmli.distributed import process_group as distributed

ROWS, COLUMNS = 1, 0  # the dimension of a tile's logits over which each of them is reduced


@dataclass
class _Sum:
    """One log(sum(exp)) for each of this rank's images or for each text of all ranks."""

    dim: int
    lse: Tensor
    gradient: Tensor  # of the losses of all tiles with respect to `lse`


class TileStatistics:
    """log(sum(exp)) of each row and column over all tiles and ranks, with the losses' gradients.

    They may be requested any number of times per tile; the n-th request must be for the same scores
    in every tile.
    """

    def __init__(self, images: int, texts: int) -> None:
        self.sizes = {ROWS: images, COLUMNS: texts}  # this rank's images, all ranks' texts
        self.sums: list[_Sum] = []
        self.places: dict[int, slice] = {}  # of the current tile
        self.leaves: list[Tensor] = []  # those returned for the current tile
        self.asked = 0  # number of requests for the current tile

    def begin_tile(self, images: slice, texts: slice) -> None:
        self.places, self.leaves, self.asked = {ROWS: images, COLUMNS: texts}, [], 0

    def _next(self) -> int:
        self.asked += 1
        return self.asked - 1

    def collect(self, logits: Tensor, dim: int) -> Tensor:
        """First pass: add a tile's logits, [R, T].

        Returns zeros, [R] or [T], with which `end_tile` finds gradients.
        """
        n, place = self._next(), self.places[dim]
        if n == len(self.sums):
            lse = logits.new_full((self.sizes[dim],), -torch.inf)
            self.sums.append(_Sum(dim, lse, torch.zeros_like(lse)))
        part = self.sums[n].lse[place]
        part.copy_(torch.logaddexp(part, logits.detach().logsumexp(dim)))
        self.leaves.append(torch.zeros_like(part, requires_grad=True))
        return self.leaves[n]

    def end_tile(self, loss: Tensor) -> None:
        """End a tile of the first pass: add the gradients of its weighted and scaled loss."""
        if self.leaves:
            for found, grad in zip(self.sums, torch.autograd.grad(loss, self.leaves), strict=True):
                found.gradient[self.places[found.dim]] += grad

    def merge(self) -> None:
        """End the first pass: combine the columns of all ranks. Collective."""
        for found in self.sums:
            if found.dim == COLUMNS and distributed.world_size() > 1:
                found.lse = collectives.logsumexp_over_ranks(found.lse)  # collective
                dist.all_reduce(found.gradient)  # collective; each rank's loss may use every column

    def known(self, logits: Tensor, dim: int) -> Tensor:
        """Second pass: log(sum(exp)) over all tiles, [R, T] -> [R] or [T].

        It has the gradient for this tile's logits.
        """
        found, place = self.sums[self._next()], self.places[dim]
        known = found.lse[place], found.gradient[place]
        return _KnownLogSumExp.apply(logits, *known, dim)  # type: ignore[no-untyped-call]


class _KnownLogSumExp(torch.autograd.Function):
    """Returns `lse`; its backward uses `grad`, the gradient of the losses of all tiles."""

    @staticmethod
    def forward(ctx, logits, lse, grad, dim):
        ctx.save_for_backward(logits, lse, grad)
        ctx.dim = dim
        return lse.clone()

    @staticmethod
    def backward(ctx, tile_grad):
        logits, lse, grad = ctx.saved_tensors
        lse, grad = lse.unsqueeze(ctx.dim), grad.unsqueeze(ctx.dim)
        return (logits - lse).exp_().mul_(grad), None, None, None
