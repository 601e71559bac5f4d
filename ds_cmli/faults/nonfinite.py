"""A step whose loss or gradients are not finite changes nothing on any rank, and is reported.

DeepSpeed's ZeRO optimizers check the gradients before each update, agree across ranks, and skip the
update if they are not finite: weights, moments and schedule stay as they were. This module adds
two things: a loss that is not finite also skips the update, and the samples of a skipped step are
named.
"""

from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ds_cmli.distributed.process_group import CollectiveFlags

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

Optimizer = Any  # one of DeepSpeed's, which have no common type
SHOWN = 8  # samples listed on the terminal; metrics.jsonl lists all of them


def poison(loss: Tensor) -> Tensor:
    """The same loss; if it is not finite, all of its gradients become NaN.

    A loss that is not finite may still have finite gradients, and may occur on one rank only. NaN
    gradients make the optimizer's own check notice it on every rank, without another collective or
    a CPU-GPU sync.
    """
    return loss * torch.where(loss.detach().isfinite(), 1.0, torch.nan)


def attach(engine: "DeepSpeedEngine") -> None:
    """Have each step that is not finite skipped, by one check, also at fp16's lowest loss scale."""
    optimizer: Optimizer = engine.optimizer
    scaler = getattr(optimizer, "loss_scaler", None)
    if scaler is not None and hasattr(scaler, "raise_error_at_min_scale"):
        scaler.raise_error_at_min_scale = False  # such steps are counted like other skipped ones


def can_lower_scale(optimizer: Optimizer) -> bool:
    """Whether overflowing gradients are no fault: the dynamic loss scale can still be lowered."""
    scaler: Any = getattr(optimizer, "loss_scaler", None)
    smallest = getattr(scaler, "min_scale", None)
    return smallest is not None and scaler.cur_scale > smallest


def skipped_samples(
    window: list[tuple[Tensor, Tensor]], lower_scale: bool, flags: CollectiveFlags
) -> list[int]:
    """The samples of a skipped step. Collective, CPU-GPU sync.

    It is called on all ranks after a skipped step only.

    Args:
        window: index [B] and loss (a scalar) of each micro-batch of this rank.
        lower_scale: what `can_lower_scale` returned; if true, gradients that are not finite are no
            fault by themselves.

    Returns:
        Sorted indices into the training set: those of the micro-batches whose loss is not finite
        or, if every loss is finite, those of the whole step. Empty if the step only asked for a
        lower loss scale.
    """
    lost: list[int] = []
    every: list[int] = []
    for index, loss in window:
        every += index.tolist()
        if not loss.isfinite().item():
            lost += index.tolist()
    ranks = flags.gather((lost, [] if lower_scale else every))  # collective
    all_lost, all_of_the_step = zip(*ranks, strict=True)
    return sorted(chain(*all_lost)) or sorted(chain(*all_of_the_step))


def line(step: int, samples: list[int]) -> str:
    """The terminal's line about a skipped step."""
    listed = ", ".join(map(str, samples[:SHOWN]))
    if len(samples) > SHOWN:
        listed += f" and {len(samples) - SHOWN} more"
    return (
        f"step {step} skipped: loss or gradients are not finite; samples {listed} of the training "
        "set"
    )
