"""Measures memory of steps on CUDA: the allocator's statistics and history, and the driver's count.

The totals are the allocator's own. The categories come from the tracker that predictions use, here
on real tensors; what the allocator counts beyond the tracker (the workspaces of libraries and
operators) is added to "temporaries".
"""

import os
import pickle
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch

from ds_cmli import engine
from ds_cmli.config.deepspeed_config import DeepSpeedConfig
from ds_cmli.config.json_values import JsonObject, Section
from ds_cmli.config.schema import Config
from ds_cmli.memory.fake import process_group
from ds_cmli.memory.inputs import longest_batch, without_weights
from ds_cmli.memory.predict import TOTAL_STEPS
from ds_cmli.memory.report import Report, summarise
from ds_cmli.memory.tracker import Tracker


def measure(config: Config, ds_config: Section, world_size: int = 1) -> Report:
    """Memory of rank 0's first two optimizer steps on this GPU; arguments as in `predict`.

    The other ranks are simulated by a fake process group, whose collectives transfer nothing. The
    peaks are those since the process began, so measure only one configuration per process. While
    the tracker watches, gradients are added up in new tensors rather than in place: `peaks` gives
    the totals without it.
    """
    tracker = Tracker("cuda")
    with process_group(world_size), tracker:
        totals = _two_steps(config, ds_config, world_size, tracker.attach_to_training)
        tracked = summarise(tracker.events(host=False), {}, "")
    name = torch.cuda.get_device_name()
    setting = {"preset": config.run.preset, "world_size": world_size, "gpu": name}
    return combined(tracked, totals, setting, f"measured: {name}")


def peaks(config: Config, ds_config: Section, world_size: int = 1) -> dict[str, int]:
    """The totals of `measure` as they are in training, where nothing watches the tensors."""
    with process_group(world_size):
        return _two_steps(config, ds_config, world_size, lambda train_engine: nullcontext())


def _two_steps(
    config: Config,
    ds_config: Section,
    world_size: int,
    watched: Callable[[engine.TrainEngine], AbstractContextManager[object]],
) -> dict[str, int]:
    device = torch.device("cuda", torch.cuda.current_device())
    ds_config = engine.filled(config, DeepSpeedConfig.of(ds_config), world_size, TOTAL_STEPS)
    config, vocab_size = without_weights(config)
    train_engine = engine.build(config, ds_config, vocab_size, TOTAL_STEPS, device)
    with watched(train_engine):
        for _ in range(2):
            batches = []
            for _ in range(ds_config.accumulation):
                batches.append(longest_batch(config, ds_config.micro_batch))
            train_engine.step(batches)
    return statistics(device)


def combined(tracked: Report, totals: dict[str, int], setting: JsonObject, source: str) -> Report:
    """A report of the tracker's categories, which add up to "requested", and the measured
    totals."""
    categories = dict(tracked.categories)
    categories["temporaries"] += totals["requested"] - tracked.totals["requested"]
    return Report(setting, source, categories, tracked.phases, totals)


def record_history(most: int = 100_000) -> None:
    """Keep the last `most` actions of CUDA's allocator from now on.

    No stacks: they cost time at every allocation.
    """
    torch.cuda.memory._record_memory_history(context=None, max_entries=most, clear_history=True)


def save_snapshot(path: Path) -> None:
    """Write the allocator's snapshot and history, for pytorch.org/memory_viz. CPU-GPU sync."""
    torch.cuda.synchronize()
    path.write_bytes(pickle.dumps(torch.cuda.memory._snapshot()))


def statistics(device: torch.device) -> dict[str, int]:
    """Peaks since they were last reset, in bytes; with "device" if the driver reports it.

    CPU-GPU sync.
    """
    torch.cuda.synchronize(device)
    stats = torch.cuda.memory_stats(device)
    names = ("requested", "allocated", "reserved")
    totals = {name: stats[f"{name}_bytes.all.peak"] for name in names}
    occupied = process_bytes(device)
    if occupied is not None:
        # The driver reports no peak: memory outside the allocator's segments is assumed to be the
        # same then as now.
        totals["device"] = occupied + totals["reserved"] - stats["reserved_bytes.all.current"]
    return totals


def process_bytes(device: torch.device) -> int | None:
    """The bytes that this process occupies on the GPU by NVML's count; None if it has none."""
    import pynvml

    try:
        pynvml.nvmlInit()
        uuid = torch.cuda.get_device_properties(device).uuid
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
        processes = pynvml.nvmlDeviceGetComputeRunningProcesses(handle)
        pynvml.nvmlShutdown()
    except pynvml.NVMLError:
        return None
    return own_bytes({process.pid: process.usedGpuMemory for process in processes}, os.getpid())


def own_bytes(used: dict[int, int | None], pid: int) -> int | None:
    """The entry of `used` for this process.

    In a container NVML may list another process id: a single entry is then taken to be this
    process's.
    """
    if pid in used:
        return used[pid]
    return next(iter(used.values())) if len(used) == 1 else None
