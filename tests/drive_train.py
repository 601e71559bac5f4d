"""Trainings in this process, one after the other, under RANK and WORLD_SIZE."""

import gc
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

from ds_cmli import train
from ds_cmli.libraries import importing

with importing():
    from ds_cmli.run import Run


@contextmanager
def another_rank() -> Iterator[None]:
    """Reset what ZeRO-3 counts in a process, so that ranks with different histories can train together."""
    from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
    from deepspeed.runtime.zero.partition_parameters import Init

    # ZeRO-3 counts the modules and parameters of a process, and compares the numbers.
    DeepSpeedZeRoOffload._register_deepspeed_module.__defaults__[0][0] = Init.param_id = 0
    with released():
        yield


@contextmanager
def released() -> Iterator[None]:
    """Release, at the end, DeepSpeed's engines that were built inside.

    An engine's hooks keep it, its group's threads and, with ZeRO-3, buckets of gigabytes that nobody has touched.
    Many of them exceed the machine's memory. The system then refuses to fork the process.
    """
    from deepspeed import comm
    from deepspeed.runtime.engine import DeepSpeedEngine

    from ds_cmli.engine import release

    engines = []
    initialize = DeepSpeedEngine.__init__

    def initialize_and_keep(engine, *arguments, **keywords):
        initialize(engine, *arguments, **keywords)
        engines.append(engine)

    with mock.patch.object(DeepSpeedEngine, "__init__", initialize_and_keep):
        yield
    for engine in engines:
        if vars(engine):  # a test may have released it
            # Releasing asks for the rank, to print on one alone. The process group may have ended.
            with mock.patch.object(comm, "get_rank", return_value=0):
                release(engine)


def drive(arguments: list[str], stop_at: int | None = None) -> int:
    """Return the exit code of one training. Send a signal to the last rank after the step `stop_at`."""
    end_step = Run.end_step

    def end_step_and_signal(run, result):
        end_step(run, result)
        if run.state.step == stop_at and int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1:
            os.kill(os.getpid(), signal.SIGUSR1)

    try:
        # Without the watchdog, which ends the process of a training that has failed.
        with mock.patch.object(Run, "end_step", end_step_and_signal), released():
            return train.command.main([*arguments, "--set", "run.watchdog=0"], standalone_mode=False)
    finally:
        gc.collect()


def drive_rank(rank: int, world: int, arguments: list[str], stop_at: int | None) -> int:
    """Call `drive` on a rank of `ranks.run`."""
    return drive(arguments, stop_at)
