"""The options `--profile FIRST:LAST` and `--profile-memory STEPS` of train.py: checked early, applied to the loop."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ds_cmli.common.errors import UserError
from ds_cmli.config.deepspeed_config import DeepSpeedConfig


@dataclass(frozen=True)
class Profiles:
    trace: str | None = None  # --profile
    memory: int | None = None  # --profile-memory

    def left(self, total_steps: int, done: int, say: Callable[[str], None]) -> "Profiles":
        """The profiles that a run can still record after `done` steps; `say` is told which ones it cannot.

        Raises:
            UserError: no start of this run could record a profile, or both profiles are asked for.
        """
        from ds_cmli.memory.profiler import parse_steps

        if self.memory is not None and not 1 <= self.memory <= total_steps:
            raise UserError(
                f"--profile-memory is {self.memory}: give 1 to {total_steps} steps of the training; 2 see the peak"
            )
        if self.memory is not None and self.trace is not None:
            raise UserError(
                f"--profile-memory is {self.memory} and --profile is {self.trace!r}: both take the profiler, give one"
            )
        trace, memory = self.trace, self.memory
        if trace is not None and parse_steps(trace, total_steps)[0] <= done:
            say(f"--profile {trace} is left out: the training goes on at step {done + 1}")
            trace = None
        if memory is not None and memory > total_steps - done:
            say(
                f"--profile-memory {memory} is left out: {total_steps - done} steps are left of the training"
            )
            memory = None
        return Profiles(trace, memory)

    @contextmanager
    def around(
        self, train_engine: Any, config: Any, ds_config: DeepSpeedConfig, folder: Path, done: int
    ) -> Iterator[Callable[[], None]]:
        """Profile the training loop inside; call the yielded function at the end of each step.

        Args:
            train_engine, config, ds_config: the `TrainEngine` and what it was built from.
            folder: the run's folder; gets `profile/` and `memory.json`.
            done: the number of steps taken before.
        """
        from ds_cmli.distributed import process_group as distributed
        from ds_cmli.memory.measure import profiling_memory
        from ds_cmli.memory.profiler import parse_steps, profiling

        steps = None if self.trace is None else parse_steps(self.trace, 10**12, done)
        with (
            profiling(steps, folder / "profile", distributed.rank(), done) as traced,
            profiling_memory(self.memory, train_engine, config, ds_config, folder) as measured,
        ):

            def after_step() -> None:
                traced()
                measured()

            yield after_step
