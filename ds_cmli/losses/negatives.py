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

from ds_cmli.cmli.contrastive import unit_rows
from ds_cmli.cmli.inputs import full_precision


@dataclass(frozen=True)
class Candidates:
    """Features without a gradient, and which of them are negatives of a query."""

    features: Tensor  # [C, H], of any norm and any float dtype
    # int64 [C] or [C, I]: none is a negative of a query that has one of its ids.
    ids: Tensor
    valid: Tensor | None = None  # bool [C]; None: all are


@dataclass(frozen=True)
class Compared:
    """What queries are compared with, and the limit of the memory for it."""

    query_ids: Tensor  # int64 [Q] or [Q, I]
    candidates: Sequence[Candidates]
    scratch_bytes: int

    @torch.no_grad()
    def tiles(self, queries: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields logits [Q, T], -inf where there is no negative, and the unit features [T, H]."""
        Q, H = queries.shape
        # Logits, masks, features upcast and normalised; a tile lives until the next one is there.
        masks = 1 if self.query_ids.dim() == 1 else 1 + self.query_ids.shape[1]
        candidate_bytes = Q * (queries.element_size() + masks) + 2 * H * queries.element_size()
        size = max(1, self.scratch_bytes // (2 * candidate_bytes))
        with full_precision(queries.device):
            for group in self.candidates:
                for start in range(0, len(group.features), size):
                    place = slice(start, start + size)
                    unit = unit_rows(group.features[place]).to(queries.dtype)
                    logits = queries @ unit.t()
                    excluded = self.query_ids[:, None] == group.ids[place]  # [Q, T] or [Q, T, I]
                    if excluded.dim() == 3:
                        excluded = excluded.any(2)
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


def log_sum_exp(queries: Tensor, compared: Compared) -> Tensor:
    """log(sum(exp)) of each query's products with its negatives' unit features.

    Args:
        queries: [Q, H] fp32 or fp64, times 1/temperature.
        compared: the negatives, whose tensors must not change before the backward pass.

    Returns:
        [Q], -inf for a query without negatives.
    """
    return _LogSumExp.apply(queries, compared)  # type: ignore[no-untyped-call]


def contrast_loss(queries: Tensor, targets: Tensor, scale: Tensor, compared: Compared) -> Tensor:
    """InfoNCE (van den Oord et al., 2018): each query is to find its target among its negatives.

    Args:
        queries: [Q, H], of any norm and any float dtype; they are compared by cosine similarity.
        targets: [Q, H], without a gradient; they count in addition to the negatives.
        scale: one element, 1/temperature.
        compared: the negatives, whose tensors must not change before the backward pass.

    Returns:
        [Q] fp32 (fp64), 0 for a query without negatives.
    """
    with full_precision(queries.device):
        scaled = unit_rows(queries) * scale
        own = (scaled * unit_rows(targets)).sum(1)
    others = log_sum_exp(scaled, compared)
    # Above its threshold softplus is rounded; by default that is 20.
    return F.softplus(others - own, threshold=60)
