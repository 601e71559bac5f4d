"""The exponential moving average (EMA) of the trained weights.

average = decay * average + (1 - decay) * weights

It starts as the weights that training starts from. What is averaged are the fp32 master weights:
each rank keeps the average of its own share of them (ZeRO's partition) on the same device, 4 bytes
for each parameter of the share. Frozen parameters and buffers (BatchNorm's statistics) have no
average: their current values are used instead.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from ds_cmli.common.errors import UserError
from ds_cmli.config.deepspeed_config import DeepSpeedConfig
from ds_cmli.config.schema import OptimConfig
from ds_cmli.engine.master_weights import master_weights, refresh_weights
from ds_cmli.faults import preemption

CHUNK = 2**22  # elements that are swapped at a time
IN_16_BIT = (("bf16", "bf16_master_weights_and_grads"), ("fp16", "fp16_master_weights_and_grads"))


def check_average(optim: OptimConfig, ds_config: Mapping[str, Any]) -> None:
    """Raise `UserError` if an average is asked for and DeepSpeed keeps no fp32 master weights."""
    sections = DeepSpeedConfig.of(ds_config)
    for section, key in IN_16_BIT:
        if optim.ema_decay and (sections.get(section) or {}).get(key):
            raise UserError(
                f"optim.ema_decay is {optim.ema_decay} and {section}.{key} is true, which keeps no "
                "fp32 weights to average: leave out one of the two"
            )


class EMA:
    """Keeps the averages of this rank's share of the master weights in `averages`."""

    def __init__(self, engine: Any, decay: float):
        """`engine`: DeepSpeed's engine, with its optimizer."""
        self.engine = engine
        self.averages: list[Tensor] = [master.clone() for master in master_weights(engine)]
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
        yield
        self._exchange()

    @contextmanager
    def as_weights(self) -> Iterator[None]:
        """Inside, forward passes use the averages. Collective.

        An error on one rank alone ends the run, so the weights are not put back then; `Preempted`
        is raised on all ranks together, and they are.
        """
        self._exchange()
        refresh_weights(self.engine)  # collective
        try:
            yield
        except preemption.Preempted:
            self._put_back()  # collective
            raise
        self._put_back()  # collective

    def _put_back(self) -> None:
        self._exchange()
        refresh_weights(self.engine)  # collective

    @torch.no_grad()
    def _exchange(self) -> None:
        """Swap averages and master weights.

        A chunk at a time, because there may be no room for a third copy.
        """
        for average, master in zip(self.averages, master_weights(self.engine), strict=True):
            rows = max(1, CHUNK * len(torch.atleast_1d(average)) // max(1, average.numel()))
            ones, others = torch.atleast_1d(average), torch.atleast_1d(master)
            for one, other in zip(ones.split(rows), others.split(rows), strict=True):
                kept = one.clone()
                one.copy_(other)
                other.copy_(kept)
