"""Steps whose loss or gradients are not finite change nothing, on any rank, and name their samples.

DeepSpeed's ZeRO optimizers look for such gradients before each update, agree on it across ranks and skip the update:
weights, moments and schedule stay as they were. What is added here: a loss that is not finite counts as such too, runs
without ZeRO are guarded as well, and the samples are told.
"""

from typing import Any

import torch
from torch import Tensor

from ds_cmli.distributed.collective_flags import CollectiveFlags

SHOWN = 8  # samples in the terminal's line; metrics.jsonl has all


def poison(loss: Tensor) -> Tensor:
    """The same loss, with gradients that are all NaN where it is not finite.

    Its gradients may be finite, or so on this rank alone; this way the check of the gradients sees it on every rank,
    without another collective or a CPU-GPU sync.
    """
    return loss * torch.where(loss.detach().isfinite(), 1.0, torch.nan)


def attach(engine: Any) -> None:
    """Guard what DeepSpeed does not: an optimizer without ZeRO, and fp16 at its smallest loss scale."""
    optimizer = engine.optimizer
    _clear_padding(optimizer)
    scaler: Any = getattr(optimizer, "loss_scaler", None)
    if hasattr(scaler, "raise_error_at_min_scale"):
        scaler.raise_error_at_min_scale = False  # such steps are counted and end the run like other bad ones
    if hasattr(optimizer, "overflow"):
        _look_once(optimizer)
        return
    update = optimizer.step

    def step(*args: Any, **kwargs: Any) -> None:
        gradients = [p.grad for p in engine.module.parameters() if p.grad is not None]
        # CPU-GPU sync. No collective: the gradients are averaged, and so the same on every rank.
        optimizer.overflow = not torch.stack(torch._foreach_norm(gradients)).isfinite().all().item()
        if not optimizer.overflow:
            update(*args, **kwargs)

    optimizer.step = step


def _look_once(optimizer: Any) -> None:
    """Leave out what stages 1 and 2 do beside the gradients' norm, which finds the same and is agreed on by all ranks.

    They search each gradient for NaN and inf, take the norm, and then skip the update where that is not finite either.
    """
    stages_1_and_2 = hasattr(optimizer, "check_grad_overflow")
    if stages_1_and_2 and optimizer.check_grad_overflow and optimizer.compute_grad_norm and not optimizer.cpu_offload:
        optimizer.check_overflow = lambda partition_gradients=True: None


def _clear_padding(optimizer: Any) -> None:
    """Zeros where ZeRO-3 leaves whatever was in memory: behind the last element of a part, saved with it."""
    flats = getattr(optimizer, "fp32_partitioned_groups_flat", ())
    for group, flat in zip(getattr(optimizer, "fp16_groups", ()), flats, strict=False):
        start = 0
        for parameter in group:
            size = parameter.ds_tensor.numel()
            used = max(0, min(size, parameter.ds_numel - optimizer._get_param_partition_rank(parameter) * size))
            parameter.ds_tensor[used:].zero_()
            flat.detach()[start + used : start + size].zero_()
            start += size


def can_lower_scale(optimizer: Any) -> bool:
    """Whether gradients that overflow only ask for less: the loss scale is dynamic and above its minimum."""
    scaler: Any = getattr(optimizer, "loss_scaler", None) or getattr(optimizer, "loss_scale_config", None)
    smallest = getattr(scaler, "min_scale", None) or getattr(scaler, "min_loss_scale", None)
    return smallest is not None and scaler.cur_scale > smallest


def skipped_samples(window: list[tuple[Tensor, Tensor]], lower_scale: bool, flags: CollectiveFlags) -> list[int]:
    """The samples of a skipped step. Collective, CPU-GPU sync; called on all ranks after a skipped step only.

    Args:
        window: index [B] and loss (a scalar) of each micro-batch of this rank.
        lower_scale: gradients alone are no fault, see `can_lower_scale`.

    Returns:
        Indices into the training set, sorted: of the micro-batches whose loss is not finite, or else of the whole
        step. Empty where that is no fault.
    """
    lost = [index.tolist() for index, loss in window if not loss.isfinite().item()]
    every_rank = flags.gather((lost, [] if lower_scale else [index.tolist() for index, _ in window]))  # collective
    blamed = [i for theirs, _ in every_rank for batch in theirs for i in batch]
    return sorted(blamed or [i for _, every in every_rank for batch in every for i in batch])


def line(step: int, samples: list[int]) -> str:
    """What the terminal says of a skipped step."""
    more = f" and {len(samples) - SHOWN} more" if len(samples) > SHOWN else ""
    return (
        f"step {step} skipped: loss or gradients are not finite; "
        f"samples {', '.join(map(str, samples[:SHOWN]))}{more} of the training set"
    )
