"""The host's memory in a prediction for a GPU, where all tensors have the same type of device.

What lies on the host is left out of the record, and what moves to the device is recorded as a copy.
"""

import torch
from torch import Tensor

from ds_cmli.common.probe import Probe
from ds_cmli.memory.tracker import Tracker


class HostMemory(Probe):
    """Makes the copies between host and device that a GPU would need."""

    def __init__(self, tracker: Tracker):
        self.tracker = tracker

    def to_device(
        self, x: Tensor, device: torch.device | str, non_blocking: bool = False
    ) -> Tensor:
        return x.clone()

    def to_host(self, x: Tensor) -> Tensor:
        with self.tracker.paused():
            return x.clone()

    def overwrite_on_host(self, x: Tensor, value: Tensor) -> None:
        with self.tracker.paused():
            x.copy_(value)
