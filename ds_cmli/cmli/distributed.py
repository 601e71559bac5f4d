"""What ranks exchange for the losses over all pairs: texts, their gradients, softmax statistics.

A rank's loss is the mean over its own pairs, and what other ranks compute for its texts is *summed*
to it. Averaging gradients over ranks, as DDP and DeepSpeed do, then gives exactly the gradient of
the global batch's mean loss: no factor of P appears anywhere.

Shapes: B pairs per rank, P ranks, G = B * P.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

# What surrounds an exchange of features or their gradients, for whoever measures it.
exchanging: Callable[[], AbstractContextManager[object]] = nullcontext


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def gather(x: Tensor) -> Tensor:
    """[B, ...] of every rank -> [G, ...] in rank order, without a gradient. Collective."""
    if world_size() == 1:
        return x
    with exchanging():
        sent = x.contiguous().view(torch.uint8)  # gloo sends neither bf16 nor bool
        out = sent.new_empty((world_size() * len(sent), *sent.shape[1:]))
        dist.all_gather_into_tensor(out, sent)
        return out.view(x.dtype)


def pad_to_longest(text: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Pad [B, M, D] and bool [B, M] to the largest M of all ranks.

    Raises ValueError, on every rank, if they differ in B. Collective, CPU-GPU sync.
    """
    if world_size() == 1:
        return text, mask
    B, M, _ = text.shape
    sizes = torch.tensor([B, -B, M], device=text.device)
    dist.all_reduce(sizes, dist.ReduceOp.MAX)
    most, least, longest = sizes.tolist()
    if most != -least:
        raise ValueError(f"ranks have {-least} to {most} pairs: drop the last unequal batch")
    return F.pad(text, (0, 0, 0, longest - M)), F.pad(mask, (0, longest - M))


def sum_to_owner(d_text: Tensor) -> Tensor:
    """[G, ...] in fp32 or fp64 -> this rank's rows of its sum over ranks, [B, ...]. Collective."""
    if world_size() == 1:
        return d_text
    with exchanging():
        own = d_text.new_empty((len(d_text) // world_size(), *d_text.shape[1:]))
        dist.reduce_scatter_tensor(own, d_text)
        return own


def logsumexp_over_ranks(lse: Tensor) -> Tensor:
    """log(sum(exp)) of each element over ranks, equal on all. Collective."""
    if world_size() == 1:
        return lse
    top = lse.clone()
    dist.all_reduce(top, dist.ReduceOp.MAX)
    total = (lse - top).exp_()
    dist.all_reduce(total)
    return top + total.log_()
