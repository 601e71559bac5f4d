"""Leaving out pairs whose softmax weight cannot count, with a bound on the gradient's error.

In backward, the gradient of a pair's score is its softmax weight times a unit that all pairs share
(an own pair's is less one unit). Each row leaves out small weights whose sum is at most `delta`,
and so does each column, over the images of all ranks. Pairs that both leave out get a gradient of
exactly 0, and the backends compute nothing for them. Loss and temperature come from the scores,
and stay exact. docs/op.md derives the bound.

Shapes: R images of this rank, G texts of all ranks, P ranks.
"""

from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from ds_cmli.cmli import collectives
from ds_cmli.cmli.contrastive import Own, temperature_scale

HALVINGS = 6  # of the range, in logarithms, in which the largest weight to leave out is sought
BLOCK = 2**20  # elements of a matrix that are looked at together
ROUNDING = 1 + 2**-7  # of the weights in fp32, and of unit vectors in bf16


def check_cut(delta: object) -> None:
    """Raise ValueError unless this is a mass that may be left out."""
    number = isinstance(delta, float | int) and not isinstance(delta, bool)
    if not number or not 0 <= delta < 1:  # type: ignore[operator]
        raise ValueError(f"cut is {delta!r}: give a number from 0 to below 1, for instance 0.001")


class Cut:
    """The mass that may be left out, and what was left out in the last backward.

    Args:
        delta: the largest sum of the softmax weights that a row or a column leaves out.
        group: the process group of the columns; None: the default one.
        weight: the sum of the weights of the losses that compare the scores.
    """

    def __init__(self, delta: float, group: dist.ProcessGroup | None = None, weight: float = 1.0):
        self.delta, self.group, self.weight = delta, group, weight
        # fp32 [2]: the share of this rank's pairs that were kept, and the bound: the norms of the
        # error of the gradient of each normalised patch add up to no more, and those of the tokens.
        # The mean over ranks is that of the gradient of the global batch's mean loss.
        self.found: Tensor | None = None

    def apply(
        self, s_i2t: Tensor, s_t2i: Tensor, first: int | Own
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The same scores [R, G], whose gradients will be cut, and the `units` of `as_loss`.

        `first`: the column of row 0's own text, or those of several. Collective in backward.
        """
        return _Cut.apply(s_i2t, s_t2i, self, first)  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def leave_out(self, grads: tuple[Tensor, Tensor], units: Tensor, first: int | Own) -> None:
        """Set to 0, in place, the gradients of pairs that do not count, and note what they were.

        Collective.

        Args:
            grads: of s_i2t and s_t2i, [R, G] each, fp32 or fp64.
            units: the gradient of those of `as_loss`. Of K right texts of an image each has 1 / K
                of the unit of its column.
            first: as in `apply`.
        """
        (R, G), limit, own = grads[0].shape, self.delta * units[0], Own.of(first)
        places = own.pairs(grads[0])
        of_own = [g[places] for g in grads]
        for g in grads:
            # A number would come from the host: a CPU-GPU sync.
            g.index_put_(places, g.new_zeros(()))
        images = R * collectives.world_size(self.group)
        of_columns = self._of_columns(grads[1])
        columns = _threshold(of_columns, G, limit / own.right, images)  # collective
        left_out, pairs = limit.new_zeros(()), torch.zeros_like(limit, dtype=torch.int64)
        for rows in _blocks(grads[0]):
            i2t, t2i = grads[0][rows], grads[1][rows]
            size, other = i2t.abs(), t2i.abs()
            low = size < _threshold(_of_rows(size), len(i2t), limit, G)[:, None]
            low &= other < columns
            left_out += size.add_(other).masked_fill_(~low, 0.0).sum()
            pairs += low.sum()
            i2t.masked_fill_(low, 0.0)
            t2i.masked_fill_(low, 0.0)
        for g, before in zip(grads, of_own, strict=True):
            g[places] = before
        kept = 1 - (pairs - len(places[0])) / (R * G)
        bound = ROUNDING * self.weight * left_out / units[1]
        self.found = torch.stack([kept, bound.to(kept.dtype)])

    def _of_columns(self, grad: Tensor) -> Callable[[Tensor], Tensor]:
        def below(top: Tensor) -> Tensor:
            total = torch.zeros_like(top)
            for rows in _blocks(grad):
                total += _below(grad[rows].abs(), top).sum(0)
            if collectives.world_size(self.group) > 1:
                dist.all_reduce(total, group=self.group)  # collective, G numbers
            return total

        return below


def as_loss(units: Tensor, logit_scale: Tensor, images: int) -> Tensor:
    """Zero, to be added to a loss that averages over R `images` and two directions.

    Backward then tells in the gradient of `units`, two zeros, what a softmax weight of 1 is in the
    gradient of a score, and the factor of the loss (its weight, and a loss scale).
    """
    unit = temperature_scale(logit_scale.detach()).sum() / (2 * images)
    return units[0] * unit + units[1]


class _Cut(torch.autograd.Function):
    @staticmethod
    def forward(ctx, s_i2t, s_t2i, cut, first):
        ctx.cut, ctx.first = cut, first
        return s_i2t.view_as(s_i2t), s_t2i.view_as(s_t2i), s_i2t.new_zeros(2)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_i2t, grad_t2i, units):
        grads = grad_i2t.contiguous().clone(), grad_t2i.contiguous().clone()
        ctx.cut.leave_out(grads, units, ctx.first)  # collective
        return *grads, None, None


def _blocks(matrix: Tensor) -> Iterator[slice]:
    """Yields the rows of blocks of at most `BLOCK` elements, and one row at least."""
    size = max(1, BLOCK // matrix.shape[1])
    for start in range(0, len(matrix), size):
        yield slice(start, start + size)


def _below(size: Tensor, top: Tensor) -> Tensor:
    """Absolute values below `top`, and 0 for the others; NaN for what is not finite."""
    return size * (size < top)  # twice as fast as to fill


def _of_rows(size: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda top: _below(size, top[:, None]).sum(1)


def _threshold(below: Callable[[Tensor], Tensor], rows: int, limit: Tensor, number: int) -> Tensor:
    """A size for each row, below which its values add up to at most `limit`.

    It is the largest such size but for the steps in which it is sought. Collective if `below` is.

    Args:
        below: the sum of each row's absolute values below such sizes.
        number: the values of a row: those below limit / number add up to less than the limit.
    """
    low, high = (limit / number).repeat(rows), limit.repeat(rows)
    for _ in range(HALVINGS):
        middle = low.sqrt() * high.sqrt()
        fits = below(middle) <= limit
        low, high = torch.where(fits, middle, low), torch.where(fits, high, middle)
    return low
