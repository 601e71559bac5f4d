"""Runs the step that `predict.py` predicts on this CPU, and measures it by allocator events.

The total is what PyTorch's allocator reports to the profiler, including temporaries inside
operators. The allocator does not know what a block is used for, so the categories come from a
second run, under the tracker.
"""

import gc
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch.profiler import profile, record_function

from ds_cmli import engine
from ds_cmli.config.deepspeed_config import DeepSpeedConfig
from ds_cmli.config.schema import Config
from ds_cmli.data.tokens import SpecialTokens
from ds_cmli.distributed.traffic import Traffic
from ds_cmli.memory import cpu_events
from ds_cmli.memory.fake import process_group
from ds_cmli.memory.host_memory import recorded_from_the_engine_on
from ds_cmli.memory.inputs import longest_batch, without_weights
from ds_cmli.memory.predict import TOTAL_STEPS
from ds_cmli.memory.report import PHASES, Report, summarise
from ds_cmli.memory.tracker import MemoryTracker, phases
from ds_cmli.memory_model.blocks import Event

MARK = "ds_cmli.memory phase "
PART_S = 1.0  # seconds that a profiler records at least within a phase


def measure(config: Config, ds_config: Mapping[str, Any], world_size: int = 1) -> Report:
    """Memory of this rank's first two optimizer steps on this CPU; arguments as in `predict`.

    If a process group is initialised, its ranks take the steps together. Otherwise this process is
    rank 0, and the other ranks are simulated by a fake process group, whose collectives transfer
    nothing.
    """
    peaks = measure_phases(config, ds_config, world_size)
    categories = summarise(tracked_events(config, ds_config, world_size), {}, "").categories
    # What the tracker does not see is allocated and freed inside a single operator.
    categories["temporaries"] += max(peaks.values()) - sum(categories.values())
    setting = {"preset": config.run.preset, "world_size": world_size, "gpu": "CPU"}
    return Report(
        setting, "measured: CPU allocator", categories, peaks, {"requested": max(peaks.values())}
    )


def measure_phases(
    config: Config, ds_config: Mapping[str, Any], world_size: int = 1
) -> dict[str, int]:
    """The peak of each phase as `measure` reports it.

    Without the categories this takes half the time.
    """
    filled = _filled(config, ds_config, world_size)
    return phase_peaks(allocator_events(lambda enter: _run(*filled, world_size, enter)))


def _filled(
    config: Config, ds_config: Mapping[str, Any], world_size: int
) -> tuple[Config, DeepSpeedConfig, int]:
    """The configuration with random weights, the DeepSpeed JSON filled in, the vocabulary size."""
    json = engine.filled(
        config, engine.on_this_device(DeepSpeedConfig.of(ds_config)), world_size, TOTAL_STEPS
    )
    config, vocab_size = without_weights(config)
    return config, json, vocab_size


def _ranks(world_size: int) -> AbstractContextManager[None]:
    return nullcontext() if dist.is_initialized() else process_group(world_size)


def counted_traffic(config: Config, ds_config: Mapping[str, Any], world_size: int) -> Traffic:
    """The traffic of this rank's collectives in its second step; arguments as in `measure`."""
    traffic = Traffic()

    def watch(train_engine: engine.TrainEngine, step: int) -> AbstractContextManager:
        return traffic.counting() if step else nullcontext()

    _run(*_filled(config, ds_config, world_size), world_size, lambda phase: None, watch)
    return traffic


Watch = Callable[[engine.TrainEngine, int], AbstractContextManager]


def two_steps(
    train_engine: engine.TrainEngine,
    config: Config,
    ds_config: DeepSpeedConfig,
    watch: Watch = lambda train_engine, step: nullcontext(),
    heartbeat: Callable[[], None] = lambda: None,
    scope: Callable[[], AbstractContextManager] = nullcontext,
) -> None:
    """Take two optimizer steps on the longest batches.

    Each step runs inside the context that `watch` returns; its batches are made inside `scope`.
    """
    for step in range(2):
        batches = []
        with scope():
            for _ in range(ds_config.accumulation):
                batches.append(longest_batch(config, ds_config.micro_batch))
        with watch(train_engine, step):
            train_engine.step(batches, heartbeat)
        del batches


def _run(
    config: Config,
    ds_config: DeepSpeedConfig,
    vocab_size: int,
    world_size: int,
    enter: Callable[[str | None], None],
    watch: Watch = lambda train_engine, step: nullcontext(),
) -> None:
    """Build the engine and take two optimizer steps.

    `enter` is called with the name of each phase as it begins, and with None at each heartbeat;
    each step runs inside the context that `watch` returns.
    """

    def models(
        config: Config, vocab_size: int, special: SpecialTokens | None = None
    ) -> engine.Models:
        built = engine.build_models(config, vocab_size, special=special)
        enter("init")
        return built

    device = torch.device("cpu")
    with _ranks(world_size):
        train_engine = engine.build(
            config, ds_config, vocab_size, TOTAL_STEPS, device, models=models
        )
        with phases(train_engine, enter):
            two_steps(train_engine, config, ds_config, watch, lambda: enter(None))


def tracked_events(
    config: Config, ds_config: Mapping[str, Any], world_size: int = 1
) -> list[Event]:
    """Allocations and frees of two real optimizer steps as the tracker sees them."""
    config, json, vocab_size = _filled(config, ds_config, world_size)
    tracker = MemoryTracker("cpu", workspaces=True)
    device = torch.device("cpu")
    with _ranks(world_size), tracker:
        models = recorded_from_the_engine_on(tracker, json, cuda=False)
        train_engine = engine.build(config, json, vocab_size, TOTAL_STEPS, device, models=models)
        with tracker.attach(train_engine):
            two_steps(train_engine, config, json, scope=lambda: tracker.scope("data"))
        return tracker.events()


def allocator_events(
    call: Callable[[Callable[[str | None], None]], object],
) -> list[tuple[str, int]]:
    """(phase, bytes) of each allocation (> 0), free (< 0) and beginning of a phase (0), in order.

    `call` gets a function `enter`, which it calls with the name of each phase that begins, and in
    between often with None, as the events recorded since take memory. Before the first call the
    phase is "".
    """
    gc.collect()
    # With other ranks gloo's threads run operators of their own, and a profiler that ends meanwhile
    # corrupts the heap.
    alone, moved = not dist.is_initialized(), time.monotonic()
    with cpu_events.seen_by_the_profiler(), recording_in_parts(MARK) as (recorded, move):

        def enter(phase: str | None) -> None:
            nonlocal moved
            if alone and (phase is not None or time.monotonic() - moved > PART_S):
                move()
                moved = time.monotonic()
            if phase is not None:
                with record_function(MARK + phase):
                    pass

        call(enter)
    phase, events = "", []
    for name, size in recorded:
        if name == cpu_events.MEMORY:
            events.append((phase, size))
        else:
            phase = name.removeprefix(MARK)
            # So that memory that is live when a phase begins counts towards its peak.
            events.append((phase, 0))
    return events


def phase_peaks(events: list[tuple[str, int]]) -> dict[str, int]:
    """The most live bytes in each phase, including live blocks from before the first phase."""
    peaks, live = dict.fromkeys(PHASES, 0), 0
    for phase, size in events:
        live += size
        if phase:
            peaks[phase] = max(peaks[phase], live)
    return peaks


class _Parts:
    """A profiler that is replaced again and again, and the events that they recorded."""

    def __init__(self, mark: str):
        self.mark = mark
        self.found: list[tuple[str, int]] = []
        self.profiler = cpu_events.recording()

    def move(self) -> None:
        """Move the events recorded so far to `found`."""
        # Nothing may be allocated or freed between the two profilers.
        ended = self.profiler
        ended.__exit__(None, None, None)
        self.profiler = cpu_events.recording()
        self.profiler.__enter__()
        self.keep(ended)

    def keep(self, ended: profile) -> None:
        for event in cpu_events.events(ended):
            if event[0] == cpu_events.MEMORY or event[0].startswith(self.mark):
                self.found.append(event)
        # Freed now: a profiler is part of a reference cycle.
        ended.profiler.kineto_results = None  # type: ignore[union-attr,assignment]


@contextmanager
def recording_in_parts(
    mark: str = cpu_events.MEMORY,
) -> Iterator[tuple[list[tuple[str, int]], Callable[[], None]]]:
    """Records the allocator's events, and those whose name begins with `mark`.

    Yields the list of events and a function that moves those recorded so far into it; the rest
    follows at the end. A profiler keeps more than a kilobyte for each event, and a long step has
    more of them than fit in memory. No other thread may run an operator while that function is
    called.
    """
    parts = _Parts(mark)
    parts.profiler.__enter__()
    try:
        yield parts.found, parts.move
    finally:
        parts.profiler.__exit__(None, None, None)
        parts.keep(parts.profiler)
