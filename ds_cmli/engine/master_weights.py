"""Finds the fp32 master weights, which the optimizer updates, at every ZeRO stage.

In fp32 without ZeRO they are the module's own parameters; otherwise a copy of them, which ZeRO
partitions over ranks.
"""

from typing import Any

import torch
from torch import Tensor, nn


def master_weights(engine: Any) -> list[Tensor]:
    """This rank's share of the trained master weights.

    It is on the host if the optimizer is offloaded.
    """
    optimizer = engine.optimizer
    # Stages 1 and 2; stage 3; DeepSpeed's BF16_Optimizer.
    for name in (
        "single_partition_of_fp32_groups",
        "fp32_partitioned_groups_flat",
        "fp32_groups_flat_partition",
    ):
        if hasattr(optimizer, name):
            return [share.detach() for share in getattr(optimizer, name)]
    masters = masters_without_zero(optimizer)
    return [masters.get(id(p), p).detach() for p in engine.module.parameters() if p.requires_grad]


def masters_without_zero(optimizer: Any) -> dict[int, Tensor]:
    """id of a 16-bit parameter -> its fp32 master copy, without ZeRO.

    DeepSpeed's own functions for it need ZeRO.
    """
    out: dict[int, Tensor] = {}
    if hasattr(optimizer, "fp32_groups"):  # FP16_UnfusedOptimizer
        for group, masters in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
            out |= {id(p): master for p, master in zip(group, masters, strict=True)}
    elif hasattr(optimizer, "fp32_groups_flat"):  # FP16_Optimizer
        for group, flat in zip(optimizer.fp16_groups, optimizer.fp32_groups_flat, strict=True):
            parts = flat.split([p.numel() for p in group])
            out |= {id(p): part for p, part in zip(group, parts, strict=True)}
    return out


@torch.no_grad()
def set_master_weight(engine: Any, parameter: nn.Parameter, value: Tensor) -> None:
    """Set a trained parameter's master weight to `value`, the whole parameter's value.

    This rank's share of it is written.
    """
    optimizer, value = engine.optimizer, value.flatten()
    if hasattr(
        parameter, "ds_id"
    ):  # DeepSpeed's function (0.19.8) fails if the ranks do not divide the size
        share, _ = optimizer._get_fp32_opt_state_partition(parameter, release_swap_buffers=True)
        start = share.numel() * optimizer._get_param_partition_rank(parameter)
        part = value[start : start + share.numel()]
        share.view(-1)[: len(part)].copy_(part)
    elif hasattr(parameter, "_hp_mapping"):
        parameter.set_full_hp_param(value)  # type: ignore[attr-defined]
    else:
        master = masters_without_zero(optimizer).get(id(parameter), parameter)
        master.copy_(value.view_as(master))


@torch.no_grad()
def refresh_weights(engine: Any) -> None:
    """Copy the master weights into the weights that forward passes use. Collective."""
    optimizer = engine.optimizer
    if hasattr(optimizer, "update_lp_params"):  # stages 1 and 2, BF16_Optimizer
        optimizer.update_lp_params()  # collective
    elif hasattr(optimizer, "fp32_partitioned_groups_flat"):  # stage 3
        optimizer.checkpoint_event_prologue()
        for number in range(len(optimizer.fp32_partitioned_groups_flat)):
            optimizer._reassign_or_swap_out_partitioned_parameters(number)
        optimizer.checkpoint_event_epilogue()  # collective
    else:
        masters = masters_without_zero(optimizer)
        for parameter in engine.module.parameters():
            if id(parameter) in masters:
                parameter.copy_(masters[id(parameter)].view_as(parameter))
