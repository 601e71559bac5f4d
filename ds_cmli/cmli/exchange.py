"""The exchange between ranks for the losses over all pairs: texts, their gradients, softmax sums.

A rank's loss is the mean over its own pairs, and the gradients that other ranks compute for its
texts are *summed*. Averaging gradients over ranks, as DDP and DeepSpeed do, then gives exactly the
gradient of the global batch's mean loss: no factor of P appears anywhere.

Texts travel as rows: the valid tokens of a rank, one after the other, without padding. Collectives
need equal sizes, so each rank sends as many rows as the rank with the most.

Shapes: B pairs per rank, P ranks, G = B * P, M text positions, D features, R rows of a rank.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .sides import has_data

# Entered around each exchange of features or of their gradients. A profiler can replace it.
exchanging: Callable[[], AbstractContextManager[object]] = nullcontext

# PyTorch 2.13 renames them; the old names are deprecated, and looked up only before that.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def this_rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def num_ranks() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def gather(x: Tensor) -> Tensor:
    """Return [B, ...] of every rank in rank order, [G, ...], without a gradient. Collective."""
    if num_ranks() == 1:
        return x
    sent = x.contiguous().view(torch.uint8)  # gloo sends neither bf16 nor bool
    received = sent.new_empty((num_ranks() * len(sent), *sent.shape[1:]))
    _all_gather(received, sent)
    return received.view(x.dtype)


class TextSizes(NamedTuple):
    """Sizes of the texts of all ranks, equal on all ranks."""

    max_tokens: int  # valid tokens of the longest text
    num_rows: int  # R, valid tokens of the rank that has the most


def gather_sizes(num_pairs: int, token_mask: Tensor | None, device: torch.device) -> TextSizes:
    """Return the sizes of all ranks' texts, given this rank's mask, bool [B, M]; None: vectors.

    Raises ValueError, on every rank, if the ranks differ in B, or have no pairs. Collective,
    CPU-GPU sync.
    """
    max_tokens = num_rows = 1
    if token_mask is not None:
        num_rows = token_mask.numel()
        max_tokens = token_mask.shape[1]
    largest = num_pairs
    if num_ranks() > 1:
        # One maximum over ranks gives both extremes: that of -B is minus the smallest B.
        sizes = torch.tensor([num_pairs, -num_pairs, max_tokens, num_rows], device=device)
        if token_mask is not None and has_data(token_mask) and num_pairs > 0:
            lengths = token_mask.sum(1)
            sizes[2] = lengths.amax()
            sizes[3] = lengths.sum()
        dist.all_reduce(sizes, dist.ReduceOp.MAX)
        largest, negative_smallest, max_tokens, num_rows = sizes.tolist()
        if largest != -negative_smallest:
            raise ValueError(
                f"ranks have {-negative_smallest} to {largest} pairs: drop the last unequal batch"
            )
    if largest == 0:
        raise ValueError("there are no pairs")
    return TextSizes(max(1, max_tokens), max(1, num_rows))


def gather_texts(
    text: Tensor, token_mask: Tensor | None, sizes: TextSizes
) -> tuple[Tensor, Tensor | None]:
    """Return the texts of all ranks [G, M, D] and their mask, valid tokens first. Collective.

    M is `max_tokens`. If there is one rank: its texts and mask as they are. Vectors have no mask.
    """
    if num_ranks() == 1:
        return text, token_mask
    with exchanging():
        if token_mask is None:
            return gather(text), None  # collective
        lengths = gather(token_mask.sum(1, dtype=torch.int32))  # collective
        mask = torch.arange(sizes.max_tokens, device=text.device) < lengths[:, None]
        rows = gather(_pack(text, token_mask, 1, sizes.num_rows))  # collective
        return rows[_row_numbers(mask, num_ranks(), sizes.num_rows)], mask


def sum_to_owner(
    d_global_text: Tensor,
    global_token_mask: Tensor | None,
    local_token_mask: Tensor | None,
    sizes: TextSizes,
) -> Tensor:
    """Return the sum of all ranks' gradients of this rank's texts, in their shape. Collective."""
    if num_ranks() == 1:
        return d_global_text
    with exchanging():
        global_rows = d_global_text
        if global_token_mask is not None:
            global_rows = _pack(d_global_text, global_token_mask, num_ranks(), sizes.num_rows)
        num_rows = len(global_rows) // num_ranks()
        local_rows = global_rows.new_empty((num_rows, *global_rows.shape[1:]))
        _reduce_scatter(local_rows, global_rows)  # collective
        del global_rows  # its memory is free for what follows
        if local_token_mask is None:
            return local_rows
        d_text = local_rows[_row_numbers(local_token_mask, 1, sizes.num_rows)]
        return d_text.masked_fill_(~local_token_mask[..., None], 0)


def logsumexp_over_ranks(lse: Tensor) -> Tensor:
    """Return log(sum(exp)) of each element over ranks, equal on all. Collective."""
    if num_ranks() == 1:
        return lse
    top = lse.clone()
    dist.all_reduce(top, dist.ReduceOp.MAX)
    total = (lse - top).exp_()
    dist.all_reduce(total)
    return top + total.log_()


def _pack(x: Tensor, mask: Tensor, num_owners: int, num_rows: int) -> Tensor:
    """Return the features at the valid positions as R rows of each owner, filled up with zeros."""
    all_rows = num_owners * num_rows
    row_numbers = torch.where(mask, _row_numbers(mask, num_owners, num_rows), all_rows)
    rows = x.new_zeros(all_rows + 1, x.shape[2])  # the last one takes the masked positions
    return rows.index_copy_(0, row_numbers.flatten(), x.flatten(0, 1))[:-1]


def _row_numbers(mask: Tensor, num_owners: int, num_rows: int) -> Tensor:
    """Return the row of each valid position of a mask [.., L]; a masked position gets any row.

    Valid positions are counted on: masks 110 and 010 of one owner get rows 011 and 122. Owner k's
    rows begin at k * num_rows.
    """
    numbers = mask.reshape(num_owners, -1).cumsum(1).sub_(1).clamp_(min=0)
    numbers += torch.arange(num_owners, device=mask.device)[:, None] * num_rows
    return numbers.view(mask.shape)
