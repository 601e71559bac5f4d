"""The host's memory in a prediction for a GPU, where all tensors have the same type of device.

What lies on the host is left out of the record, and what moves to the device is recorded as a copy.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from deepspeed.accelerator import get_accelerator, set_accelerator
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
from torch import Tensor, nn

from ds_cmli import engine
from ds_cmli.common.patches import patched
from ds_cmli.common.probe import Probe
from ds_cmli.config.deepspeed_config import DeepSpeedConfig
from ds_cmli.config.schema import Config
from ds_cmli.data.tokens import SpecialTokens
from ds_cmli.memory.fake import convert_parameters
from ds_cmli.memory.tracker import MemoryTracker
from ds_cmli.memory_model import gpus
from ds_cmli.memory_model.caching_allocator import replay


class HostMemory(Probe):
    """Makes the copies between host and device that a GPU would need."""

    def __init__(self, tracker: MemoryTracker):
        self.tracker = tracker

    def to_device(
        self, x: Tensor, device: torch.device | str, non_blocking: bool = False
    ) -> Tensor:
        return x.clone()

    def on_gpu(self, device: torch.device) -> bool:
        return True

    def to_host(self, x: Tensor) -> Tensor:
        with self.tracker.paused():
            return x.clone()


def recorded_from_the_engine_on(
    tracker: MemoryTracker,
    ds_config: DeepSpeedConfig,
    cuda: bool,
    enter: Callable[[str], None] = lambda phase: None,
) -> Callable[..., engine.Models]:
    """What builds the models for `engine.build`, on the host.

    The tracker records from where the engine takes them; `enter("init")` is called there.
    """
    dtype = engine.DTYPES[ds_config.precision]

    def cast(model: nn.Module | None) -> None:
        convert_parameters(model, lambda parameter: parameter.to(dtype))

    def models(
        config: Config, vocab_size: int, special: SpecialTokens | None = None
    ) -> engine.Models:
        with tracker.paused():
            objective, teacher = engine.build_models(config, vocab_size, special=special)
            if cuda:  # both have been cast when they arrive on the device
                cast(objective)
                cast(teacher)
        enter("init")
        tracker.claim("parameters", [*objective.parameters(), *objective.buffers()])
        if not cuda:
            if teacher is not None:
                tracker.claim("teacher", [*teacher.parameters(), *teacher.buffers()])
            cast(objective)  # here, because the engine cannot cast fake tensors
        return objective, teacher

    return models


class PredictedDevice(CPU_Accelerator):
    """DeepSpeed's accelerator: it answers for the predicted device, and not for this machine."""

    def __init__(self, tracker: MemoryTracker, gpu: str, world_size: int, overlaps: bool):
        """`overlaps`: what is done on streams of DeepSpeed's own is recorded as such."""
        super().__init__()
        self.tracker, self.gpu, self.world_size = tracker, gpu, world_size
        self.overlaps = overlaps

    def is_fp16_supported(self) -> bool:
        return self.tracker.gpu is not None or super().is_fp16_supported()

    def available_memory(self, device_index: int | None = None) -> int:
        """The bytes that are free once the GPU's allocator has returned all free segments."""
        if self.tracker.gpu is None:
            return 1 << 60
        segments = replay(self.tracker.events()).segments
        in_use = sum(segment.size for segment in segments if not segment.free)
        reserved = gpus.device_bytes(in_use, self.gpu, self.world_size)
        return gpus.find(self.gpu).total.bytes - reserved

    def empty_cache(self) -> None:
        self.tracker.record_emptied_cache()

    def stream(self, stream: object) -> AbstractContextManager[None]:
        """CUDA's allocator keeps streams apart; one is named by the module that switches to it."""
        if self.overlaps:
            return self.tracker.on_stream(sys._getframe(1).f_globals["__name__"])
        return nullcontext()


@contextmanager
def answering(device: PredictedDevice) -> Iterator[None]:
    """Inside, DeepSpeed asks `device`, and its stages 1 and 2 flatten parameters as there.

    They copy each group of parameters into one flat buffer: on the device if it has room, otherwise
    on the host, after the group's parameters have left the device.
    """
    tracker, accelerator = device.tracker, get_accelerator()

    def flattened(flatten: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(
            optimizer: object,
            tensors: list[Tensor],
            alignment: int,
            use_cpu_data: bool = False,
            **options: object,
        ) -> Tensor:
            if not use_cpu_data:
                return flatten(optimizer, tensors, alignment, **options)
            with tracker.paused():
                flat = flatten(optimizer, tensors, alignment, use_cpu_data=True, **options)
            tracker.claim("parameters", [flat])  # it is then moved to the device
            return flat

        return run

    with (
        patched("deepspeed: flattened parameters", flattened),
        patched("torch: copy to the host", lambda _: lambda x: HostMemory(tracker).to_host(x)),
    ):
        set_accelerator(device)
        try:
            yield
        finally:
            set_accelerator(accelerator)
