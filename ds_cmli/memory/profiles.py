"""What `train.py --profile FIRST:LAST` and `--profile-memory STEPS` ask for: checked early, and put around the loop."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ds_cmli.errors import UserError


@dataclass(frozen=True)
class Profiles:
    trace: str | None = None  # --profile
    memory: int | None = None  # --profile-memory

    def check(self, total_steps: int, done: int) -> None:
        """Raise `UserError` for what cannot be had from the steps `done` + 1 to `total_steps`."""
        from ds_cmli.memory.profiler import parse_steps

        most = total_steps - done
        if self.memory is not None and not 1 <= self.memory <= most:
            raise UserError(
                f"--profile-memory is {self.memory}: give 1 to {most} steps of the training; 2 see the peak"
            )
        if self.memory is not None and self.trace is not None:
            raise UserError(
                f"--profile-memory is {self.memory} and --profile is {self.trace!r}: both take the profiler, give one"
            )
        if self.trace is not None:
            parse_steps(self.trace, total_steps, done)

    @contextmanager
    def around(
        self, trainer: Any, config: Any, ds_config: dict[str, Any], folder: Path, done: int
    ) -> Iterator[Callable[[], None]]:
        """Around the training loop; call what this yields at the end of each step.

        Args:
            trainer, config, ds_config: the `Step` and what it was built from.
            folder: the run's; gets `profile/` and `memory.json`.
            done: steps taken before.
        """
        from ds_cmli import distributed
        from ds_cmli.memory.measure import profiling_memory
        from ds_cmli.memory.profiler import parse_steps, profiling

        steps = None if self.trace is None else parse_steps(self.trace, 10**12, done)
        with (
            profiling(steps, folder / "profile", distributed.rank(), done) as traced,
            profiling_memory(self.memory, trainer, config, ds_config, folder) as measured,
        ):

            def after_step() -> None:
                traced()
                measured()

            yield after_step
