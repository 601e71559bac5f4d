"""A step whose loss or gradients are not finite changes nothing on any rank, and is reported.

DeepSpeed's ZeRO optimizers check the gradients before each update, agree across ranks, and skip the
update if they are not finite: weights, moments and schedule stay as they were. This module adds
that a loss that is not finite also skips the update, and that the samples of such a step are named.
"""

from typing import Any

import torch
from torch import Tensor

from ds_cmli.distributed.process_group import CollectiveFlags

Optimizer = Any  # one of DeepSpeed's, which have no common type
SHOWN = 8  # samples listed on the terminal; metrics.jsonl lists all of them


def poison(loss: Tensor) -> Tensor:
    """The same loss; if it is not finite, all of its gradients become NaN.

    A loss that is not finite may still have finite gradients, and may occur on one rank only. NaN
    gradients make the optimizer's own check notice it on every rank, without another collective or
    a CPU-GPU sync.
    """
    return loss * torch.where(loss.detach().isfinite(), 1.0, torch.nan)


def count_at_lowest_scale(optimizer: Optimizer) -> None:
    """Have fp16's overflows at the lowest loss scale skipped, and not raised."""
    scaler: Any = getattr(optimizer, "loss_scaler", None)
    if hasattr(scaler, "raise_error_at_min_scale"):
        scaler.raise_error_at_min_scale = False


def can_lower_scale(optimizer: Optimizer) -> bool:
    """Whether overflowing gradients are no fault: the dynamic loss scale can still be lowered."""
    scaler: Any = getattr(optimizer, "loss_scaler", None)
    smallest = getattr(scaler, "min_scale", None)
    return smallest is not None and scaler.cur_scale > smallest


def skipped_samples(
    window: list[tuple[Tensor, Tensor]], lower_scale: bool, flags: CollectiveFlags
) -> list[int]:
    """The samples of a skipped step, as sorted indices into the training set. Collective.

    They are those of the micro-batches whose loss is not finite or, if every loss is finite, of the
    whole step: unless that one only asked for a lower loss scale. CPU-GPU sync.

    Args:
        window: index [B] and loss (a scalar) of each micro-batch of this rank.
        lower_scale: what `can_lower_scale` returned.
    """
    own = [(index.tolist(), bool(loss.isfinite())) for index, loss in window]
    every = [batch for of_rank in flags.gather(own) for batch in of_rank]  # collective
    lost = [sample for samples, finite in every if not finite for sample in samples]
    whole = [] if lower_scale else [sample for samples, _ in every for sample in samples]
    return sorted(lost or whole)


def line(step: int, samples: list[int]) -> str:
    """The terminal's line about a skipped step."""
    shown = ", ".join(map(str, samples[:SHOWN]))
    more = f" and {len(samples) - SHOWN} more" if len(samples) > SHOWN else ""
    what = f"loss or gradients are not finite; samples {shown}{more} of the training set"
    return f"step {step} skipped: {what}"
