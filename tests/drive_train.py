"""Trainings in this process, one after the other, under RANK and WORLD_SIZE."""

import gc
import io
import json
import os
import signal
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from unittest import mock

from ds_cmli import train
from ds_cmli.common import UserError


def drive(arguments: list[str], stop_at: int | None = None, seen: str | None = None, mistakes: bool = False) -> int:
    """The exit code of one training.

    Args:
        stop_at: a signal is sent to the last rank after this step.
        seen: gets one line of sample indices for each micro-batch of rank R, with `.R` behind its name.
        mistakes: a `UserError` is printed and counts as 2.
    """
    from ds_cmli.engine import TrainEngine
    from ds_cmli.run import Run
    from tests.engines import released

    end_step, one_step = Run.end_step, TrainEngine.step

    def ended(run, result):
        end_step(run, result)
        if run.state.step == stop_at and int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1:
            os.kill(os.getpid(), signal.SIGUSR1)

    def step(engine, micro_batches, heartbeat):
        if seen:
            with open(f"{seen}.{os.environ['RANK']}", "a") as file:
                file.writelines(json.dumps(batch.index.tolist()) + "\n" for batch in micro_batches)
        return one_step(engine, micro_batches, heartbeat)

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(Run, "end_step", ended))
        stack.enter_context(mock.patch.object(TrainEngine, "step", step))
        try:
            # Without the watchdog, which ends the process of a training that has failed.
            with released():
                return train.command.main([*arguments, "--set", "run.watchdog=0"], standalone_mode=False)
        except UserError as error:
            if not mistakes:
                raise
            print(f"error: {error}", flush=True)
            return 2
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
