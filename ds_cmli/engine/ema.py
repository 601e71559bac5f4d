"""The fp32 master weights, which the optimizer updates, and their exponential moving average (EMA).

average = decay * average + (1 - decay) * weights, from the weights that training starts from.

The master weights are a copy of the module's parameters, which ZeRO partitions over ranks. Each
rank keeps the average of its own share on the same device, 4 bytes for each parameter. Frozen
parameters and buffers (BatchNorm's statistics) have no average: their current values are used.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from ds_cmli.distributed import process_group as distributed
from ds_cmli.errors import UserError
from ds_cmli.faults import preemption

CHUNK = 2**22  # elements that are swapped at a time


class EMA:
    """Keeps the averages of this rank's share of the master weights in `averages`."""

    def __init__(self, engine: Any, decay: float):
        """Raises `UserError` if the optimizer of `engine` keeps no fp32 master weights."""
        self.engine = engine
        self.averages: list[Tensor] = [master.clone() for master in master_weights(engine)]
        if any(average.dtype != torch.float32 for average in self.averages):
            raise UserError(
                f"optim.ema_decay is {decay} and the DeepSpeed JSON has its master weights in 16 "
                "bits, which cannot be averaged: leave out one of the two"
            )
        self._average = get_ema_multi_avg_fn(decay)

    def update(self) -> None:
        """Update the averages; to be called after each update of the weights that was applied."""
        self._average(self.averages, master_weights(self.engine), None)

    def restart(self) -> None:
        """Set the averages to the current weights."""
        for average, master in zip(self.averages, master_weights(self.engine), strict=True):
            average.copy_(master)

    @contextmanager
    def as_master_weights(self) -> Iterator[None]:
        """Inside, the tensors of the master weights hold the averages, and the other way round."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @contextmanager
    def as_weights(self) -> Iterator[None]:
        """Inside, forward passes use the averages. Collective.

        After an error the master weights are put back. The weights that forward passes use are then
        refreshed only if all ranks raise, as with `Preempted`, or if there is one rank, because
        that is collective.
        """
        try:
            with self.as_master_weights():
                refresh_weights(self.engine)  # collective
                yield
        except BaseException as error:
            if isinstance(error, preemption.Preempted) or distributed.world_size() == 1:
                refresh_weights(self.engine)  # collective
            raise
        refresh_weights(self.engine)  # collective

    @torch.no_grad()
    def _exchange(self) -> None:
        """Swap averages and master weights, in chunks: a third copy may have no room."""
        for average, master in zip(self.averages, master_weights(self.engine), strict=True):
            parts = zip(average.view(-1).split(CHUNK), master.view(-1).split(CHUNK), strict=True)
            for average_part, master_part in parts:
                kept = average_part.clone()
                average_part.copy_(master_part)
                master_part.copy_(kept)


def master_weights(engine: Any) -> list[Tensor]:
    """Return this rank's share of the trained master weights, on the host if offloaded."""
    optimizer = engine.optimizer
    # Stages 1 and 2; stage 3; DeepSpeed's BF16_Optimizer.
    for name in (
        "single_partition_of_fp32_groups",
        "fp32_partitioned_groups_flat",
        "fp32_groups_flat_partition",
    ):
        if hasattr(optimizer, name):
            return [share.detach() for share in getattr(optimizer, name)]
    raise AssertionError(f"{type(optimizer).__name__} is no optimizer of ZeRO")


@torch.no_grad()
def set_master_weight(engine: Any, parameter: nn.Parameter, value: Tensor) -> None:
    """Write this rank's share of a parameter's master weight; `value` is the whole one."""
    optimizer = engine.optimizer
    value = value.flatten()
    if hasattr(parameter, "ds_id"):
        # DeepSpeed's function (0.19.8) fails if the ranks do not divide the size.
        share, _ = optimizer._get_fp32_opt_state_partition(parameter, release_swap_buffers=True)
        start = share.numel() * optimizer._get_param_partition_rank(parameter)
        part = value[start : start + share.numel()]
        share.view(-1)[: len(part)].copy_(part)
    else:
        parameter.set_full_hp_param(value)  # type: ignore[attr-defined]


@torch.no_grad()
def refresh_weights(engine: Any) -> None:
    """Copy the master weights into the weights that forward passes use. Collective."""
    optimizer = engine.optimizer
    if hasattr(optimizer, "update_lp_params"):  # stages 1 and 2, BF16_Optimizer
        optimizer.update_lp_params()  # collective
    else:  # stage 3
        optimizer.checkpoint_event_prologue()
        for number in range(len(optimizer.fp32_partitioned_groups_flat)):
            optimizer._reassign_or_swap_out_partitioned_parameters(number)
        optimizer.checkpoint_event_epilogue()  # collective
