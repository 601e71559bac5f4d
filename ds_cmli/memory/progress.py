"""Progress of predictions and measurements on stderr: the trial that runs, and what is left."""

import sys
import time


class Progress:
    """Lines about trials: on a terminal one line that changes, elsewhere a line for each trial.

    Args:
        num_trials: how many there will be; None: each `begin` estimates how many are left.
    """

    def __init__(self, num_trials: int | None = None):
        self.num_trials = num_trials
        self.num_begun = 0
        self.started = time.monotonic()

    def begin(self, trial: str, num_left: int = 1) -> None:
        """Print a line about a trial; about `num_left` are left, with this one."""
        number = f"{self.num_begun + 1}"
        if self.num_trials is not None:
            number += f" of {self.num_trials}"
            num_left = self.num_trials - self.num_begun
        line = f"trial {number}: {trial}"
        if self.num_begun:
            seconds = (time.monotonic() - self.started) / self.num_begun * num_left
            line += f"; about {seconds:.0f} s left"
        self.num_begun += 1
        if sys.stderr.isatty():
            print(f"\r\033[K{line}", end="", file=sys.stderr, flush=True)
        else:
            print(line, file=sys.stderr, flush=True)

    def end(self) -> None:
        """Clear the line on a terminal."""
        if sys.stderr.isatty():
            print("\r\033[K", end="", file=sys.stderr, flush=True)
