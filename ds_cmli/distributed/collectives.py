"""What the losses exchange between ranks: text features with their gradients, and column softmax statistics.

Only text moves, the smaller side. A rank computes its block row of the score matrix, its own B images against
the G = B * P texts of all ranks; whatever a loss needs from other rows comes as vectors of length G.

Shapes: B pairs per rank, P ranks, G = B * P, M text positions, D embedding dimension.
Gradients follow one rule: every rank's loss is the mean over its own pairs, and a gradient that belongs to another
rank is *summed* over the ranks that computed a part of it. The average over ranks that data-parallel training takes
is then exactly the gradient of the global batch's mean loss: no factor of P appears anywhere.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from ds_cmli.distributed import process_group as distributed


def gather(x: Tensor) -> Tensor:
    """[B, K] of every rank -> [G, K] in rank order, without a gradient. Collective."""
    return x if distributed.world_size() == 1 else _all_gather(x, None)


def _all_gather(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """[B, ...] of every rank -> [G, ...] in rank order, bit for bit, for any dtype. Collective."""
    # As bytes: gloo supports neither bf16 nor bool.
    x = x.contiguous()
    sent = x.view(torch.uint8) if x.dtype != torch.bool else x.to(torch.uint8)
    out = torch.empty((distributed.world_size(group) * x.shape[0], *sent.shape[1:]), dtype=torch.uint8, device=x.device)
    dist.all_gather_into_tensor(out, sent, group=group)  # collective
    return out.view(x.dtype) if x.dtype != torch.bool else out.bool()


def _all_shapes(x: Tensor, group: dist.ProcessGroup | None) -> list[list[int]]:
    """Every rank's shape of `x`, in rank order. Collective, a CPU-GPU sync."""
    return _all_gather(torch.tensor([x.shape], dtype=torch.int64, device=x.device), group).tolist()


def accumulated(dtype: torch.dtype) -> torch.dtype:
    """fp32 (fp64 for fp64), in which gradients of several ranks are added up.

    Contributions in half precision would lose bits, and overflow under loss scaling.
    """
    return torch.promote_types(dtype, torch.float32)


def sum_to_owner(grad: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """[G, ...] of every rank, summed over ranks -> this rank's rows [B, ...], fp32 (fp64 for fp64). Collective."""
    wide = accumulated(grad.dtype)
    # Contiguous: gloo sends a strided tensor's storage in the wrong order without complaint.
    grad = grad.to(wide).contiguous()
    if distributed.world_size(group) == 1:
        return grad
    own = torch.empty((len(grad) // distributed.world_size(group), *grad.shape[1:]), dtype=wide, device=grad.device)
    with distributed.exchanging():
        dist.reduce_scatter_tensor(own, grad, group=group)  # collective
    return own


class _GatherWithGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        ctx.group, ctx.dtype = group, x.dtype
        with distributed.exchanging():
            return _all_gather(x, group)

    @staticmethod
    def backward(ctx, grad):
        return sum_to_owner(grad, ctx.group).to(ctx.dtype), None


def gather_with_gradient(x: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """[B, ...] of every rank -> [G, ...]; the gradient of each row returns to its owner, summed over ranks.

    Shapes must be equal on all ranks. Collective, in forward and in backward.
    """
    return x if distributed.world_size(group) == 1 else _GatherWithGradient.apply(x, group)


def pad_text(text: Tensor, mask: Tensor, group: dist.ProcessGroup | None = None) -> tuple[Tensor, Tensor]:
    """This rank's text features [B, M, D] and masks [B, M], padded to the longest M of all ranks. Collective.

    Raises:
        ValueError: on every rank, where batch size or D differ between ranks.
    """
    if distributed.world_size(group) == 1:
        return text, mask
    shapes = _all_shapes(text, group)  # collective, and a CPU-GPU sync: they decide how the tensors are padded
    if len({(b, d) for b, _, d in shapes}) > 1:
        raise ValueError(
            f"the ranks' text features must agree in batch size and width, found [B, M, D] = {shapes}: "
            "drop the last incomplete batch"
        )
    missing = max(m for _, m, _ in shapes) - text.shape[1]
    pad = torch.nn.functional.pad
    return pad(text, (0, 0, 0, missing)), pad(mask, (0, missing))


def gather_text(text: Tensor, mask: Tensor, group: dist.ProcessGroup | None = None) -> tuple[Tensor, Tensor]:
    """Every rank's text features and masks, as `pad_text` gives them: [B, M, D], bool [B, M] -> [G, M, D], bool [G, M].

    The gradient of the features returns to their owner, summed over ranks in fp32 (fp64 for fp64). Collective.
    """
    if distributed.world_size(group) == 1:
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
    """log(sum(exp)) over the images of all ranks: this rank's rows [B, G] -> [G], the same on every rank.

    fp32 or fp64. Collective, in forward and in backward: two vectors of length G there, one back.
    """
    return logits.logsumexp(0) if distributed.world_size(group) == 1 else _ColumnLogSumExp.apply(logits, group)


def logsumexp_over_ranks(lse: Tensor) -> Tensor:
    """log(sum(exp)) over the ranks of each element: [G] -> [G], equal on every rank, without a gradient. Collective."""
    if distributed.world_size() == 1:
        return lse
    top = lse.clone()
    dist.all_reduce(top, op=dist.ReduceOp.MAX)  # collective, G numbers
    total = (lse - top).exp_()
    dist.all_reduce(total)  # collective, G numbers
    return top + total.log_()
