"""Gradient caching (Gao et al., 2021): losses over pairs see all micro-batches of a step.

1. The features of all micro-batches, without a graph. 2. The losses over their pairs, with the
features as leaves: no parameter takes part, and so no hook of the engine. 3. Each micro-batch runs
again, with the same dropout, and goes backward from its features' gradients, together with the
losses that do not compare pairs.

The leaves of a step and their gradients are there at the same time.

Shapes: A micro-batches of B pairs.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ds_cmli.cmli.sides import upcast


class KnownGradient(torch.autograd.Function):
    """Returns zero; its backward gives `gradient` times `factor` as the gradient of `x`."""

    @staticmethod
    def forward(ctx, x, gradient, factor):
        ctx.save_for_backward(gradient)
        ctx.factor, ctx.dtype = factor, x.dtype
        return torch.zeros((), dtype=upcast(x[:0]).dtype, device=x.device)

    @staticmethod
    def backward(ctx, grad):
        (gradient,) = ctx.saved_tensors
        return (gradient * (grad * ctx.factor).to(gradient.dtype)).to(ctx.dtype), None, None


class Compared(NamedTuple):
    """The losses over the pairs of a step, and the gradients of what they compare."""

    total: Tensor  # the weighted sum, without a graph, like the next
    values: dict[str, Tensor]
    gradients: dict[str, Tensor]  # [A * B, ..]

    def of(self, number: int, count: int, positions: int) -> dict[str, Tensor]:
        """The gradients of one of `count` micro-batches, with so many text positions."""
        known = {name: x.chunk(count)[number] for name, x in self.gradients.items()}
        if "tokens" in known:
            known["tokens"] = known["tokens"][:, :positions]
        return known


@torch.enable_grad()
def compared(
    features: list[dict[str, Tensor]],
    compare: Callable[[dict[str, Tensor]], dict[str, Tensor]],
    weighted: Callable[[dict[str, Tensor]], list[Tensor]],
    scale: float = 1.0,
) -> Compared:
    """Compare the pairs of all micro-batches. Collective.

    Args:
        features: of each micro-batch, which are taken out of it.
        scale: multiplies the gradients, which keeps them from vanishing in fp16.
    """
    leaves = {name: _joined([f.pop(name) for f in features]) for name in [*features[0]]}
    values = compare(leaves)  # collectives
    total = torch.stack(weighted(values)).sum()
    (total * scale).backward()  # collectives
    gradients = {name: x.grad for name, x in leaves.items() if x.grad is not None}
    return Compared(total.detach(), {n: x.detach() for n, x in values.items()}, gradients)


def _joined(parts: list[Tensor]) -> Tensor:
    """One leaf; texts are padded to the longest."""
    if parts[0].ndim > 1:
        longest = max(x.shape[1] for x in parts)
        parts = [F.pad(x, [0, 0] * (x.ndim - 2) + [0, longest - x.shape[1]]) for x in parts]
    leaf = torch.cat(parts)
    return leaf.requires_grad_(leaf.is_floating_point())


def random_states(device: torch.device) -> list[Tensor]:
    """Of the generators that dropout draws from."""
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states


def set_random_states(states: list[Tensor], device: torch.device) -> None:
    torch.set_rng_state(states[0])
    for state in states[1:]:
        torch.cuda.set_rng_state(state, device)
