"""The contrastive loss of pair scores with a learned temperature, as pure functions of tensors.

Shapes: B pairs of this rank, G >= B texts that they are compared with. Everything is computed in fp32, or in fp64 for
fp64 inputs.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

MAX_SCALE = 100.0  # the maximum of 1/temperature, as in CLIP (Radford et al., 2021)


def upcast(x: Tensor) -> Tensor:
    """Cast to fp32; fp64 stays fp64."""
    return x if x.dtype == torch.float64 else x.float()


def temperature_scale(logit_scale: Tensor) -> Tensor:
    """exp(logit_scale), at most 100, in fp32.

    The clamp is a straight-through one: above 100 the value is constant but the gradient still passes, so a parameter
    that drifted over the limit can return. A plain clamp has no gradient there, and the parameter would stay stuck.
    """
    x = upcast(logit_scale)
    return (x + (x.clamp(max=math.log(MAX_SCALE)) - x).detach()).exp()


def contrastive_loss(
    s_i2t: Tensor,
    s_t2i: Tensor,
    logit_scale: Tensor,
    first: int = 0,
    column_logsumexp: Callable[[Tensor], Tensor] = lambda logits: logits.logsumexp(0),
    ignore: Tensor | None = None,
) -> Tensor:
    """(CE(rows of t * s_i2t) + CE(columns of t * s_t2i)) / 2, the mean over this block's B pairs.

    Args:
        s_i2t: [B, G] fp32 or fp64, this rank's images against all texts, scored from the image's side (3).
        s_t2i: [B, G], the same pairs scored from the text's side (4); the global loss passes one matrix twice.
        logit_scale: one element, ln(1/temperature).
        first: the column that belongs to row 0: row b's text is column first + b.
        column_logsumexp: [B, G] -> [G], over the images of the whole batch. The default is right if the block is the
            whole batch; across ranks pass `distributed.collectives.column_logsumexp`.
        ignore: bool [B, G], images and texts that are no negatives of each other; None: there are none.

    Returns:
        A scalar. Averaged over ranks it is the loss of the global batch.
    """
    scale = temperature_scale(logit_scale)  # one element
    rows, columns = scale * s_i2t, scale * s_t2i  # [B, G]
    if ignore is not None:
        rows, columns = (x.masked_fill_(ignore, -torch.inf) for x in (rows, columns))
    b = torch.arange(rows.shape[0], device=rows.device)
    row_loss = rows.logsumexp(1) - rows[b, first + b]  # [B]
    column_loss = column_logsumexp(columns)[first + b] - columns[b, first + b]  # [B]
    return (row_loss.mean() + column_loss.mean()) / 2
