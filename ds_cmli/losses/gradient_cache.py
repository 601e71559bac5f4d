"""Gradient caching (Gao et al., 2021): losses over pairs see all micro-batches of a step.

1. The student computes the features of all micro-batches, without a graph.
2. The losses over their pairs are computed with the features as leaves: no parameter takes part,
   and so no hook of the engine.
3. Each micro-batch runs again, with the same dropout, and goes backward from the gradients of its
   features, together with the losses that do not compare pairs.

The leaves of a step and their gradients exist at the same time.

Shapes: A micro-batches of B pairs.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ds_cmli.cmli.sides import score_dtype


class KnownGradient(torch.autograd.Function):
    """Returns zero; its backward gives `gradient` times `factor` as the gradient of `x`."""

    @staticmethod
    def forward(ctx, x, gradient, factor):
        if x.ndim > 1:
            gradient = gradient[:, : x.shape[1]]  # without the padding of longer texts
        ctx.save_for_backward(gradient)
        ctx.factor = factor
        ctx.dtype = x.dtype
        return torch.zeros((), dtype=score_dtype(x), device=x.device)

    @staticmethod
    def backward(ctx, d_zero):
        (gradient,) = ctx.saved_tensors
        factor = (d_zero * ctx.factor).to(gradient.dtype)
        return (gradient * factor).to(ctx.dtype), None, None


class PairGradients(NamedTuple):
    """The losses over the pairs of a step, and the gradients of the features."""

    total: Tensor  # the weighted sum of the losses, without a graph
    losses: dict[str, Tensor]  # each loss by name, without a graph
    gradients: dict[str, Tensor]  # [A * B, ..] of each feature, by name


@torch.enable_grad()
def compare_cached(
    features: list[dict[str, Tensor]],
    compare: Callable[[dict[str, Tensor]], dict[str, Tensor]],
    weigh: Callable[[dict[str, Tensor]], list[Tensor]],
    loss_scale: float,
) -> PairGradients:
    """Compute the losses over the pairs of all micro-batches, and their gradients. Collective.

    Args:
        features: the features of each micro-batch by name; they are taken out of the dictionaries.
        compare: returns the losses of features by name.
        loss_scale: multiplies the gradients, which keeps fp16 gradients from vanishing.
    """
    names = list(features[0])
    leaves = {name: _leaf([micro_batch.pop(name) for micro_batch in features]) for name in names}
    losses = compare(leaves)  # collectives
    total = torch.stack(weigh(losses)).sum()
    (total * loss_scale).backward()  # collectives
    gradients = {name: x.grad for name, x in leaves.items() if x.grad is not None}
    detached = {name: loss.detach() for name, loss in losses.items()}
    return PairGradients(total.detach(), detached, gradients)


def _leaf(parts: list[Tensor]) -> Tensor:
    """Join a feature of all micro-batches, texts padded to the longest, into a leaf."""
    if parts[0].ndim > 1:
        longest = max(x.shape[1] for x in parts)
        parts = [F.pad(x, [0, 0] * (x.ndim - 2) + [0, longest - x.shape[1]]) for x in parts]
    leaf = torch.cat(parts)
    return leaf.requires_grad_(leaf.is_floating_point())
