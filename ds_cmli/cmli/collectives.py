"""What the losses exchange between ranks: text features and column softmax statistics.

Only texts are exchanged, since they are smaller than images. Each rank computes its block row of
the score matrix: its own B images against the G = B * P texts of all ranks. What a loss needs from
other rows is exchanged as vectors of length G.

Shapes: B pairs per rank, P ranks, G = B * P, M text positions, D embedding dimension.
Gradients follow one rule: each rank's loss is the mean over its own pairs, and the parts of a
gradient that belongs to another rank are *summed* over the ranks that computed them. Data-parallel
training then averages over ranks, and the result is exactly the gradient of the global batch's mean
loss. No factor of P appears anywhere.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from ds_cmli.common.probe import probe


class Host:
    """Where ranks on GPUs tell each other shapes without a CPU-GPU sync."""

    group: dist.ProcessGroup | None = None  # of all ranks over gloo, while there is one


def rank(group: dist.ProcessGroup | None = None) -> int:
    return dist.get_rank(group) if dist.is_initialized() else 0


def world_size(group: dist.ProcessGroup | None = None) -> int:
    return dist.get_world_size(group) if dist.is_initialized() else 1


def gather(x: Tensor) -> Tensor:
    """[B, K] of every rank -> [G, K] in rank order, without a gradient. Collective."""
    return x if world_size() == 1 else _all_gather(x, None)


def _all_gather(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """[B, ...] of every rank -> [G, ...] in rank order, bit for bit. Collective."""
    with probe.scope("exchanged text"):
        # Sent as bytes, because gloo supports neither bf16 nor bool.
        x = x.contiguous()
        sent = x.view(torch.uint8) if x.dtype != torch.bool else x.to(torch.uint8)
        shape = (world_size(group) * x.shape[0], *sent.shape[1:])
        out = torch.empty(shape, dtype=torch.uint8, device=x.device)
        dist.all_gather_into_tensor(out, sent, group=group)  # collective
        if x.dtype != torch.bool:
            return out.view(x.dtype)
        return out.bool()


def _all_shapes(x: Tensor, group: dist.ProcessGroup | None) -> list[list[int]]:
    """The shape of `x` on every rank, in rank order. Collective, CPU-GPU sync but on the host."""
    device = x.device
    if group is None and Host.group is not None:
        group, device = Host.group, torch.device("cpu")
    own = torch.tensor([x.shape], dtype=torch.int64, device=device)
    return probe.read_shapes(_all_gather(own, group), x.shape)  # collective, CPU-GPU sync


def agreed(
    facts: Tensor, mistake: Exception | None, group: dist.ProcessGroup | None = None
) -> Tensor:
    """The `facts` [K] of every rank, in rank order: fp32 [P, K]. Collective, CPU-GPU sync.

    Raises:
        `mistake`, which this rank has found, or a ValueError with another rank's: none is left
        waiting.
    """
    own = torch.cat([facts, facts.new_full((1,), mistake is not None)])
    gathered = _all_gather(own[None], group)  # collective
    if gathered[:, -1].any():
        mistakes: list[str] = [""] * len(gathered)
        dist.all_gather_object(mistakes, str(mistake or ""), group=group)  # collective
        if mistake is not None:
            raise mistake
        rank, reason = next((rank, reason) for rank, reason in enumerate(mistakes) if reason)
        raise ValueError(f"rank {rank}: {reason}")
    return gathered[:, :-1]


def accumulated(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which gradients of several ranks are added up: fp32, or fp64 for fp64.

    In 16 bit the sum would lose precision, and overflow under loss scaling.
    """
    return torch.promote_types(dtype, torch.float32)


def sum_to_owner(grad: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """Sum [G, ...] over ranks, in fp32 (fp64 for fp64). Collective.

    Returns this rank's rows of the sum, [B, ...].
    """
    wide = accumulated(grad.dtype)
    # Made contiguous, because gloo sends a strided tensor's elements in the wrong order without an
    # error.
    grad = grad.to(wide).contiguous()
    if world_size(group) == 1:
        return grad
    shape = (len(grad) // world_size(group), *grad.shape[1:])
    own = torch.empty(shape, dtype=wide, device=grad.device)
    with probe.exchanging():
        dist.reduce_scatter_tensor(own, grad, group=group)  # collective
    return own


class _GatherWithGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        ctx.group, ctx.dtype = group, x.dtype
        with probe.exchanging():
            return _all_gather(x, group)

    @staticmethod
    def backward(ctx, grad):
        with probe.scope("exchanged text"):
            return sum_to_owner(grad, ctx.group).to(ctx.dtype), None


def gather_with_gradient(x: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """[B, ...] of every rank -> [G, ...], differentiably.

    The gradient of each row returns to the rank that owns it, summed over ranks. Shapes must be
    equal on all ranks. Collective, in forward and in backward.
    """
    if world_size(group) == 1:
        return x
    return _GatherWithGradient.apply(x, group)


def pad_text(
    text: Tensor, mask: Tensor, group: dist.ProcessGroup | None = None
) -> tuple[Tensor, Tensor]:
    """Pad this rank's text features [B, M, D] and masks [B, M] to the largest M of all ranks.

    Collective.

    Raises:
        ValueError: on every rank, if the batch size or D differs between ranks.
    """
    if world_size(group) == 1:
        return text, mask
    # Collective; CPU-GPU sync, because the padding depends on them.
    shapes = _all_shapes(text, group)
    if len({(b, d) for b, _, d in shapes}) > 1:
        raise ValueError(
            "the ranks' text features must agree in batch size and width, "
            f"found [B, M, D] = {shapes}: drop the last incomplete batch"
        )
    missing = max(m for _, m, _ in shapes) - text.shape[1]
    pad = torch.nn.functional.pad
    return pad(text, (0, 0, 0, missing)), pad(mask, (0, missing))


def gather_text(
    text: Tensor, mask: Tensor, group: dist.ProcessGroup | None = None
) -> tuple[Tensor, Tensor]:
    """The text features and masks of all ranks: [B, M, D], bool [B, M] -> [G, M, D], bool [G, M].

    The inputs are the results of `pad_text`. The gradient of the features returns to the rank that
    owns them, summed over ranks in fp32 (fp64 for fp64). Collective, in forward and in backward.
    """
    if world_size(group) == 1:
        return text, mask
    return gather_with_gradient(text, group), _all_gather(mask, group)


class _ColumnLogSumExp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, group):
        ctx.group = group
        top = logits.amax(0)
        dist.all_reduce(top, op=dist.ReduceOp.MAX, group=group)  # collective, G numbers
        total = (logits - top).exp_().sum(0)
        dist.all_reduce(total, group=group)  # collective, G numbers
        lse = top + total.log_()
        ctx.save_for_backward(logits, lse)
        return lse

    @staticmethod
    def backward(ctx, grad):
        logits, lse = ctx.saved_tensors
        grad = grad.contiguous().clone()
        dist.all_reduce(grad, group=ctx.group)  # collective: every rank's loss may use every column
        return (logits - lse).exp_().mul_(grad), None


def column_logsumexp(logits: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """log(sum(exp)) over the images of all ranks: [B, G] of this rank -> [G], equal on all ranks.

    fp32 or fp64. Collective: two vectors of length G in forward, one in backward.
    """
    if world_size(group) == 1:
        return logits.logsumexp(0)
    return _ColumnLogSumExp.apply(logits, group)


def logsumexp_over_ranks(lse: Tensor) -> Tensor:
    """log(sum(exp)) of each element over ranks: [G] -> [G], equal on all, without a gradient.

    Collective.
    """
    if world_size() == 1:
        return lse
    top = lse.clone()
    dist.all_reduce(top, op=dist.ReduceOp.MAX)  # collective, G numbers
    total = (lse - top).exp_()
    dist.all_reduce(total)  # collective, G numbers
    return top + total.log_()
