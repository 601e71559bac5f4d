"""The negatives of a contrast with the teacher's features, compared in tiles that are not kept.

Shapes: Q queries, C candidates, T of them in a tile, H width. The matrix [Q, C] of all tokens and
all patches of a batch has the size that the source document held impossible, so backward computes
it a second time.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ds_cmli.cmli.contrastive import upcast
from ds_cmli.cmli.inputs import full_precision


@dataclass(frozen=True)
class Candidates:
    """Features without a gradient, and which of them are negatives of a query."""

    features: Tensor  # [C, H], of any norm and any float dtype
    ids: Tensor  # int64 [C]: none is a negative of a query of the same id
    valid: Tensor | None = None  # bool [C]; None: all are


@dataclass(frozen=True)
class Compared:
    """What queries are compared with, and the limit of the memory for it."""

    query_ids: Tensor  # int64 [Q]
    candidates: Sequence[Candidates]
    scratch_bytes: int

    @torch.no_grad()
    def tiles(self, queries: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields logits [Q, T], -inf where there is no negative, and the unit features [T, H]."""
        Q, H = queries.shape
        # Logits, mask, features upcast and normalised; a tile lives until the next one is there.
        each = Q * (queries.element_size() + 1) + 2 * H * queries.element_size()
        size = max(1, self.scratch_bytes // (2 * each))
        with full_precision(queries.device):
            for group in self.candidates:
                for start in range(0, len(group.features), size):
                    place = slice(start, start + size)
                    unit = F.normalize(upcast(group.features[place]), dim=1).to(queries.dtype)
                    logits = queries @ unit.t()
                    excluded = self.query_ids[:, None] == group.ids[place]  # [Q, T]
                    if group.valid is not None:
                        excluded |= ~group.valid[place]
                    logits.masked_fill_(excluded, -torch.inf)
                    yield logits, unit


class _LogSumExp(torch.autograd.Function):
    """log(sum(exp)) of each query's logits, -inf without negatives: [Q, H] -> [Q]."""

    @staticmethod
    def forward(ctx, queries, compared):
        top = queries.new_full((len(queries), 1), torch.finfo(queries.dtype).min)
        total = torch.zeros_like(top)
        for logits, _ in compared.tiles(queries):
            higher = torch.maximum(top, logits.amax(1, keepdim=True))
            total.mul_((top - higher).exp_()).add_(logits.sub_(higher).exp_().sum(1, keepdim=True))
            top = higher
        lse = (top + total.log_()).squeeze(1)
        ctx.save_for_backward(queries, lse)
        ctx.compared = compared
        return lse

    @staticmethod
    def backward(ctx, grad):
        queries, lse = ctx.saved_tensors
        # Without negatives all logits are -inf, and their weights 0.
        finite = lse.masked_fill(lse == -torch.inf, 0.0)[:, None]
        out = torch.zeros_like(queries)
        with full_precision(queries.device):
            for logits, unit in ctx.compared.tiles(queries):
                out.addmm_(logits.sub_(finite).exp_().mul_(grad[:, None]), unit)
        return out, None


def contrast_loss(queries: Tensor, targets: Tensor, scale: Tensor, compared: Compared) -> Tensor:
    """InfoNCE (van den Oord et al., 2018): each query is to find its target among its negatives.

    Args:
        queries: [Q, H], of any norm and any float dtype; they are compared by cosine similarity.
        targets: [Q, H], without a gradient; they count beside the negatives.
        scale: one element, 1/temperature.
        compared: the negatives, whose tensors must not change before the backward pass.

    Returns:
        [Q] fp32 (fp64), 0 for a query without negatives.
    """
    with full_precision(queries.device):
        scaled = F.normalize(upcast(queries), dim=1) * scale
        own = (scaled * F.normalize(upcast(targets), dim=1)).sum(1)
    others = _LogSumExp.apply(scaled, compared)  # type: ignore[no-untyped-call]
    # Above its threshold softplus is rounded; by default that is 20.
    return F.softplus(others - own, threshold=60)
