"""A step whose loss or gradients are not finite changes nothing on any rank, and is reported.

DeepSpeed's ZeRO optimizers check the gradients before each update, agree across ranks, and skip the
update if they are not finite: weights, moments and schedule stay as they were. This module adds
that a loss that is not finite also skips the update, and that the samples of such a step are named.
"""

from typing import Any

import torch
from torch import Tensor

from ds_cmli.distributed.process_group import CollectiveFlags, gather_objects

SHOWN = 8  # samples listed on the terminal; metrics.jsonl lists all of them


def poison(loss: Tensor) -> Tensor:
    """Return the same loss; if it is not finite, all of its gradients become NaN.

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
    micro_batches: list[tuple[Tensor, Tensor]], optimizer: Any, flags: CollectiveFlags
) -> list[int]:
    """Return the samples of a skipped step, as sorted indices into the training set.

    They are those of the micro-batches whose loss is not finite. If every loss is finite, they are
    those of the whole step, or none if fp16's loss scale can still be lowered. Collective, CPU-GPU
    sync.

    Args:
        micro_batches: index [B] and loss (a scalar) of each micro-batch of this rank.
        optimizer: DeepSpeed's.
    """
    local_batches = [(index.tolist(), bool(loss.isfinite())) for index, loss in micro_batches]
    gathered = gather_objects(local_batches, flags.group)  # collective
    batches = [batch for batches_of_rank in gathered for batch in batches_of_rank]
    nonfinite_samples = [sample for samples, finite in batches if not finite for sample in samples]
    # fp16 has a loss scaler; a dynamic one has a `min_scale`.
    scaler: Any = getattr(optimizer, "loss_scaler", None)
    if nonfinite_samples or (hasattr(scaler, "min_scale") and scaler.cur_scale > scaler.min_scale):
        return sorted(nonfinite_samples)
    return sorted(sample for samples, _ in batches for sample in samples)


def skipped_line(step: int, samples: list[int]) -> str:
    """Return the terminal's line about a skipped step."""
    shown = ", ".join(map(str, samples[:SHOWN]))
    more = f" and {len(samples) - SHOWN} more" if len(samples) > SHOWN else ""
    reason = f"loss or gradients are not finite; samples {shown}{more} of the training set"
    return f"step {step} skipped: {reason}"
