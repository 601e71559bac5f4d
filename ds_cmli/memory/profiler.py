"""Writes a torch.profiler trace of the steps that `train.py --profile FIRST:LAST` names: memory, shapes and stacks.

Read it with `tensorboard --logdir <run>/profile` (the plugin torch-tb-profiler), or open the .json in Perfetto.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ds_cmli.common.errors import UserError


def parse_steps(text: str, total_steps: int, done: int = 0) -> tuple[int, int]:
    """ "3:5" -> (3, 5): the first and the last step, counted from 1 as in the log.

    Raises `UserError` for any other text, and for steps outside `done` + 1 to `total_steps`, the steps that the run is
    about to take.
    """
    first, colon, last = text.partition(":")
    if not (colon and first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last)):
        raise UserError(
            f"--profile is {text!r}: give the first and the last step, from 1, for instance 3:5"
        )
    if not done < int(first) <= int(last) <= total_steps:
        raise UserError(
            f"--profile is {text!r}: give some of the steps {done + 1} to {total_steps} of this training"
        )
    return int(first), int(last)


@contextmanager
def profiling(
    steps: tuple[int, int] | None, folder: Path, rank: int = 0, done: int = 0
) -> Iterator[Callable[[], None]]:
    """Profile the training loop inside; call the yielded function at the end of each of its steps.

    Args:
        steps: the first and the last step to record, counted from 1; None: nothing is recorded.
        done: the number of steps taken before.
        folder: gets one file from each rank, `rank<r>.<time>.pt.trace.json`, after the last recorded step.
    """
    if steps is None:
        yield lambda: None
        return
    import torch
    from torch.profiler import ProfilerActivity, profile, schedule, tensorboard_trace_handler

    handler = tensorboard_trace_handler(str(folder), worker_name=f"rank{rank}")

    def write(profiler: Any) -> None:
        try:
            handler(profiler)
        except (OSError, RuntimeError) as error:  # the training goes on
            print(f"warning: rank {rank}: no trace in {folder}: {error}", flush=True)

    first, last = (step - done for step in steps)
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
    # The step before the first recorded one, if there is one, is the warm-up, because starting the tracer takes time.
    warmup = min(first - 1, 1)
    with profile(
        activities=activities,
        schedule=schedule(
            wait=first - 1 - warmup, warmup=warmup, active=last - first + 1, repeat=1
        ),
        on_trace_ready=write,
        profile_memory=True,
        record_shapes=True,
        with_stack=True,
    ) as profiler:
        yield profiler.step
