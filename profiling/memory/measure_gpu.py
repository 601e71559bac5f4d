"""Runs the step that `predict.py` predicts on this GPU, and measures it."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch

from ds_cmli import engine
from ds_cmli.common.json_text import Section
from ds_cmli.config.deepspeed_config import DeepSpeedConfig
from ds_cmli.config.schema import Config
from ds_cmli.memory.fake import process_group
from ds_cmli.memory.inputs import without_weights
from ds_cmli.memory.measure import combined, statistics
from ds_cmli.memory.predict import TOTAL_STEPS
from ds_cmli.memory.report import Report, summarise
from ds_cmli.memory.tracker import MemoryTracker
from profiling.memory.measure_cpu import two_steps


def measure(config: Config, ds_config: Section, world_size: int = 1) -> Report:
    """Memory of rank 0's first two optimizer steps on this GPU; arguments as in `predict`.

    The other ranks are simulated by a fake process group, whose collectives transfer nothing. The
    peaks are those since the process began, so measure only one configuration per process. While
    the tracker watches, gradients are added up in new tensors rather than in place: `peaks` gives
    the totals without it.
    """
    tracker = MemoryTracker("cuda")
    with process_group(world_size), tracker:
        totals = _two_steps(config, ds_config, world_size, tracker.attach_to_training)
        tracked = summarise(tracker.events(), {}, "")
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
        two_steps(train_engine, config, ds_config)
    return statistics(device)
