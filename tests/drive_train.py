"""Trainings in this process, one after the other, under RANK and WORLD_SIZE."""

import gc
import io
import os
import signal
from contextlib import redirect_stderr, redirect_stdout
from unittest import mock

from ds_cmli import train


def drive(arguments: list[str], stop_at: int | None = None) -> int:
    """The exit code of one training. After the step `stop_at` a signal is sent to the last rank."""
    from ds_cmli.run import Run
    from tests.engines import released

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


def drive_each(rank: int, world_size: int, tasks: list[dict]) -> tuple[list[int], str]:
    """A rank's exit codes of several trainings, and what it has printed.

    Each task has the arguments of `drive` by name, and the `port` at which its ranks meet.
    """
    codes, printed = [], io.StringIO()
    with redirect_stdout(printed), redirect_stderr(printed):
        for task in tasks:
            os.environ["MASTER_PORT"] = str(task["port"])
            codes.append(drive(**{name: value for name, value in task.items() if name != "port"}))
    return codes, printed.getvalue()
