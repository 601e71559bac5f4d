"""The exchange between ranks for the losses over all pairs: texts, their gradients, softmax sums.

A rank's loss is the mean over its own pairs, and the gradients that other ranks compute for its
texts are *summed*. Averaging gradients over ranks, as DDP and DeepSpeed do, then gives exactly the
gradient of the global batch's mean loss: no factor of P appears anywhere.

Texts travel as rows: the valid tokens of a rank, one after the other, without padding. Collectives
need equal sizes, so each rank sends as many rows as the rank with the most.

Shapes: B pairs per rank, P ranks, G = B * P, M text positions, D features, R rows of a rank at
most.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from .sides import has_data

# A context around each exchange of features or their gradients, for whoever measures it.
exchanging: Callable[[], AbstractContextManager[object]] = nullcontext

# PyTorch 2.13 renames them.
_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
_reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


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

    longest: int  # valid tokens of a text, at most
    num_rows: int  # R


def gather_sizes(num_pairs: int, token_mask: Tensor | None, device: torch.device) -> TextSizes:
    """Return the sizes of all ranks' texts, given this rank's mask, bool [B, M]; None: vectors.

    Raises ValueError, on every rank, if the ranks differ in B, or have no pairs. Collective,
    CPU-GPU sync.
    """
    longest = num_rows = 1
    if token_mask is not None:
        num_rows = token_mask.numel()
        longest = token_mask.shape[1]
    largest = num_pairs
    if num_ranks() > 1:
        # Their maxima; that of -B is the smallest B.
        sizes = torch.tensor([num_pairs, -num_pairs, longest, num_rows], device=device)
        if token_mask is not None and has_data(token_mask) and num_pairs > 0:
            lengths = token_mask.sum(1)
            sizes[2] = lengths.amax()
            sizes[3] = lengths.sum()
        dist.all_reduce(sizes, dist.ReduceOp.MAX)
        largest, negative_smallest, longest, num_rows = sizes.tolist()
        if largest != -negative_smallest:
            raise ValueError(
                f"ranks have {-negative_smallest} to {largest} pairs: drop the last unequal batch"
            )
    if largest == 0:
        raise ValueError("there are no pairs")
    return TextSizes(max(1, longest), max(1, num_rows))


def gather_texts(text: Tensor, token_mask: Tensor, sizes: TextSizes) -> tuple[Tensor, Tensor]:
    """Return the texts of all ranks [G, longest, D] and their mask, valid tokens first. Collective.

    On one rank these are the text [B, M, D] and its mask [B, M] as they are.
    """
    if num_ranks() == 1:
        return text, token_mask
    with exchanging():
        lengths = gather(token_mask.sum(1, dtype=torch.int32))  # collective
        rows = text.flatten(0, 1)[_valid_first(token_mask.flatten(), sizes.num_rows)]
        rows = F.pad(rows, (0, 0, 0, sizes.num_rows - len(rows)))
        global_rows = gather(rows)  # collective
        mask = torch.arange(sizes.longest, device=text.device) < lengths[:, None]
        padded = global_rows.new_zeros(mask.numel(), text.shape[2])
        padded.index_copy_(0, _places(mask, sizes), global_rows)
        return padded.view(*mask.shape, -1), mask


def sum_texts_to_owner(
    d_texts: Tensor, mask: Tensor, token_mask: Tensor, sizes: TextSizes
) -> Tensor:
    """Return the sum over ranks of the gradient of this rank's texts, [B, M, D]. Collective.

    Args:
        d_texts: [G, longest, D] in fp32 or fp64, the gradient of `gather_texts`.
        mask: that of `gather_texts`.
        token_mask: this rank's, bool [B, M].
    """
    if num_ranks() == 1:
        return d_texts
    rows = sum_to_owner(d_texts.flatten(0, 1)[_places(mask, sizes)])  # collective
    places = _valid_first(token_mask.flatten(), sizes.num_rows)
    d_text = rows.new_zeros(token_mask.numel(), rows.shape[1])
    d_text.index_copy_(0, places, rows[: len(places)])
    return d_text.view(*token_mask.shape, -1)


def sum_to_owner(gradient: Tensor) -> Tensor:
    """Return this rank's part of the sum over ranks: [P * B, ...] -> [B, ...]. Collective."""
    if num_ranks() == 1:
        return gradient
    with exchanging():
        part = gradient.new_empty((len(gradient) // num_ranks(), *gradient.shape[1:]))
        _reduce_scatter(part, gradient)
        return part


def logsumexp_over_ranks(lse: Tensor) -> Tensor:
    """Return log(sum(exp)) of each element over ranks, equal on all. Collective."""
    if num_ranks() == 1:
        return lse
    top = lse.clone()
    dist.all_reduce(top, dist.ReduceOp.MAX)
    total = (lse - top).exp_()
    dist.all_reduce(total)
    return top + total.log_()


def _places(mask: Tensor, sizes: TextSizes) -> Tensor:
    """Return the place of each row of all ranks, [P * R], in the texts [G * longest] of a mask."""
    masks = mask.view(num_ranks(), -1)
    first = torch.arange(num_ranks(), device=mask.device) * masks.shape[1]
    return (_valid_first(masks, sizes.num_rows) + first[:, None]).flatten()


def _valid_first(mask: Tensor, num_rows: int) -> Tensor:
    """Return positions of a mask [.., L], the valid ones first, `num_rows` of them at most.

    A rank with fewer valid tokens than `num_rows` sends masked ones too, which count nowhere.
    """
    return mask.argsort(dim=-1, descending=True, stable=True)[..., :num_rows]
