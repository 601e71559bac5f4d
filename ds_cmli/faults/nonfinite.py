"""A step whose loss or gradients are not finite changes nothing on any rank, and is reported.

DeepSpeed's ZeRO optimizers check the gradients before each update, agree across ranks, and skip the
update if they are not finite: weights, moments and schedule stay as they were. This module adds
that a loss that is not finite also skips the update, and that the samples of such a step are named.
"""

from typing import Any

import torch
from torch import Tensor

from ds_cmli.distributed.process_group import CollectiveFlags

SHOWN = 8  # samples listed on the terminal; metrics.jsonl lists all of them


def poison(loss: Tensor) -> Tensor:
    """The same loss; if it is not finite, all of its gradients become NaN.

    A loss that is not finite may still have finite gradients, and may occur on one rank only. NaN
    gradients make the optimizer's own check notice it on every rank, without another collective or
    a CPU-GPU sync.
    """
    return loss * torch.where(loss.detach().isfinite(), 1.0, torch.nan)


def count_at_lowest_scale(optimizer: Any) -> None:
    """Have fp16's overflows at the lowest loss scale skipped, and not raised."""
    scaler: Any = getattr(optimizer, "loss_scaler", None)
    if hasattr(scaler, "raise_error_at_min_scale"):
        scaler.raise_error_at_min_scale = False


def skipped_samples(
    window: list[tuple[Tensor, Tensor]], optimizer: Any, flags: CollectiveFlags
) -> list[int]:
    """The samples of a skipped step, as sorted indices into the training set. Collective.

    They are those of the micro-batches whose loss is not finite. If every loss is finite, they are
    those of the whole step, or none where fp16's loss scale can still be lowered. CPU-GPU sync.

    Args:
        window: index [B] and loss (a scalar) of each micro-batch of this rank.
        optimizer: DeepSpeed's.
    """
    own = [(index.tolist(), bool(loss.isfinite())) for index, loss in window]
    every = [batch for of_rank in flags.gather(own) for batch in of_rank]  # collective
    lost = [sample for samples, finite in every if not finite for sample in samples]
    # Of fp16; a dynamic one has a `min_scale`.
    scaler: Any = getattr(optimizer, "loss_scaler", None)
    if lost or (hasattr(scaler, "min_scale") and scaler.cur_scale > scaler.min_scale):
        return sorted(lost)
    return sorted(sample for samples, _ in every for sample in samples)


def line(step: int, samples: list[int]) -> str:
    """The terminal's line about a skipped step."""
    shown = ", ".join(map(str, samples[:SHOWN]))
    more = f" and {len(samples) - SHOWN} more" if len(samples) > SHOWN else ""
    what = f"loss or gradients are not finite; samples {shown}{more} of the training set"
    return f"step {step} skipped: {what}"
