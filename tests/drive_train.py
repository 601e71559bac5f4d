"""Trainings in this process, one after the other, under RANK and WORLD_SIZE."""

import gc
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

from ds_cmli import train


@contextmanager
def another_rank() -> Iterator[None]:
    """Inside, this process is one of ranks that have run more or less than it before."""
    from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
    from deepspeed.runtime.zero.partition_parameters import Init

    # ZeRO-3 counts the modules and parameters of a process, and compares the numbers.
    DeepSpeedZeRoOffload._register_deepspeed_module.__defaults__[0][0] = Init.param_id = 0
    with released():
        yield


@contextmanager
def released() -> Iterator[None]:
    """DeepSpeed's engines that were built inside are released at the end.

    An engine's hooks keep it and its group's threads and, with ZeRO-3, buckets of gigabytes that nobody has touched.
    Enough of them are more than the machine has, and then the system refuses to fork the process.
    """
    from deepspeed import comm
    from deepspeed.runtime.engine import DeepSpeedEngine

    from ds_cmli.engine import release

    built, make = [], DeepSpeedEngine.__init__

    def made(engine, *arguments, **more):
        make(engine, *arguments, **more)
        built.append(engine)

    with mock.patch.object(DeepSpeedEngine, "__init__", made):
        yield
    for engine in built:
        if vars(engine):  # one inside may have ended it
            # It only asks which rank prints. The process group may have ended.
            with mock.patch.object(comm, "get_rank", return_value=0):
                release(engine)


def drive(arguments: list[str], stop_at: int | None = None) -> int:
    """The exit code of one training. After the step `stop_at` a signal is sent to the last rank."""
    from ds_cmli.run import Run

    end_step = Run.end_step

    def ended(run, result):
        end_step(run, result)
        if run.state.step == stop_at and int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1:
            os.kill(os.getpid(), signal.SIGUSR1)

    try:
        # Without the watchdog, which ends the process of a training that has failed.
        with mock.patch.object(Run, "end_step", ended), released():
            return train.command.main([*arguments, "--set", "run.watchdog=0"], standalone_mode=False)
    finally:
        gc.collect()


def drive_rank(rank: int, world: int, arguments: list[str], stop_at: int | None) -> int:
    """The same of a rank of `ranks.run`."""
    return drive(arguments, stop_at)
