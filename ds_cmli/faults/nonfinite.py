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
from torch.overrides import TorchFunctionMode

from ds_cmli.common.patches import patched
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
    _clear_padding(engine)
    if hasattr(optimizer, "get_grad_norm_direct"):  # not BF16_Optimizer
        _fill_numbers(optimizer)
    scaler = getattr(optimizer, "loss_scaler", None)
    if scaler is not None and hasattr(scaler, "raise_error_at_min_scale"):
        scaler.raise_error_at_min_scale = False  # such steps are counted like other skipped ones
    _look_once(optimizer)


def _look_once(optimizer: Optimizer) -> None:
    """Remove checks that ZeRO does twice, each a CPU-GPU sync.

    It searches every gradient for NaN and inf (at stage 3 in fp16), and then computes the
    gradients' norm and skips the update if the norm is not finite. The norm alone finds the same
    steps, and is the same on all ranks. Stages 1 and 2 ask again whether it is finite to clip the
    gradients of each group by it.
    """
    if hasattr(optimizer, "offload_optimizer"):  # stage 3
        if not optimizer.offload_optimizer:
            optimizer.check_overflow = lambda partition_gradients=True: None
        return
    if not hasattr(optimizer, "check_grad_overflow"):  # BF16_Optimizer
        return
    if optimizer.compute_grad_norm and not optimizer.cpu_offload:
        optimizer.check_overflow = lambda partition_gradients=True: None
    clip = optimizer.unscale_and_clip_grads

    def clip_by_finite(gradients: object, norm: Tensor) -> None:
        with patched("deepspeed: norm asked again", lambda _: lambda norm: False):
            clip(gradients, norm)

    optimizer.unscale_and_clip_grads = clip_by_finite


def _fill_numbers(optimizer: Optimizer) -> None:
    """Keep ZeRO from copying numbers to the device, for each group, at a CPU-GPU sync."""
    norm_of = optimizer.get_grad_norm_direct

    def norm(*arguments: object) -> Tensor:
        with _Filled():
            return norm_of(*arguments)

    optimizer.get_grad_norm_direct = norm


class _Filled(TorchFunctionMode):
    """Inside, `torch.tensor` of a number writes it on the device instead of copying it there."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.tensor:
            return torch.full((), *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _clear_padding(engine: "DeepSpeedEngine") -> None:
    """Zero the padding at the end of ZeRO-3's partitions, which is otherwise saved as it was."""
    optimizer: Optimizer = engine.optimizer
    flats = getattr(optimizer, "fp32_partitioned_groups_flat", ())
    for group, flat in zip(getattr(optimizer, "fp16_groups", ()), flats, strict=False):
        start = 0
        for parameter in group:
            size, used = parameter.ds_tensor.numel(), _clear_end(optimizer, parameter)
            flat.detach()[start + used : start + size].zero_()
            start += size
    for parameter in engine.module.parameters():
        if hasattr(parameter, "ds_tensor") and not parameter.requires_grad:  # frozen: in no group
            _clear_end(optimizer, parameter)


def _clear_end(optimizer: Optimizer, parameter: Any) -> int:
    """Zero what is not the parameter's in this rank's partition; returns the size of the rest."""
    size = parameter.ds_tensor.numel()
    before = optimizer._get_param_partition_rank(parameter) * size
    used = max(0, min(size, parameter.ds_numel - before))
    parameter.ds_tensor[used:].zero_()
    return used


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
