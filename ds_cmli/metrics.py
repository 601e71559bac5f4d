"""Writes a run's numbers to metrics.jsonl, to trackers and to the terminal. Only rank 0 writes."""

import json
import math
import resource
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from ds_cmli import trackers
from ds_cmli.checkpoint.run_files import RunFiles
from ds_cmli.checkpoint.run_folder import METRICS
from ds_cmli.common.errors import UserError
from ds_cmli.common.probe import Probe
from ds_cmli.config import registry
from ds_cmli.distributed import process_group as distributed
from ds_cmli.engine import TrainEngine
from ds_cmli.engine.throughput import StepTimer, peak_flops
from ds_cmli.trackers import tag

ALIVE_SECONDS = 10  # within a step nothing is printed more often


class Writer:
    """Writes a run's numbers: to `metrics.jsonl`, to trackers, and to the terminal.

    There it is a progress bar, or plain lines if it is no terminal.

    If the disk is full, lines wait in memory, what trackers cannot write is lost, and the run goes
    on.
    """

    def __init__(
        self,
        folder: Path,
        total_steps: int,
        first_step: int = 0,
        report_to: Sequence[str] = ("tensorboard",),
        callbacks: Sequence[trackers.Tracker] = (),
    ):
        """Open the trackers `report_to`, names from `registry.TRACKERS`; `callbacks` are open.

        Raises `UserError` if one cannot be opened.
        """
        self.files, self.told = RunFiles(folder), set[str]()
        self.lines = self.files.lines()
        self.evaluations = (0, 0)  # the step of the last logged evaluation, and its number of lines
        self.trackers = {
            name: registry.load(registry.TRACKERS[name])(folder, first_step) for name in report_to
        }
        for number, callback in enumerate(callbacks):
            self.trackers[f"callbacks[{number}]"] = callback
        self.total = total_steps
        self.started, self.first_step = time.monotonic(), first_step
        self.said = self.started  # when something was printed
        self.bar = tqdm(
            total=total_steps,
            initial=first_step,
            unit="step",
            dynamic_ncols=True,
            disable=not sys.stderr.isatty(),
        )

    def say(self, *lines: str) -> None:
        self.said = time.monotonic()
        for line in lines:
            # The terminal or the launcher may be gone, and the run still has to be saved.
            with suppress(OSError):
                tqdm.write(line, file=sys.stdout)
                sys.stdout.flush()

    def advance(self) -> None:
        with suppress(OSError):
            self.bar.update()

    def say_alive(self, step: int, so_far: Callable[[], Mapping[str, float]]) -> None:
        """Where the time goes, if nothing has been printed for a while.

        Args:
            step: the step that is being taken.
            so_far: gives the seconds in each phase since the last logged step.
        """
        if time.monotonic() - self.said < ALIVE_SECONDS:
            return
        seconds = so_far()
        total = sum(seconds.values())
        if total:  # otherwise the GPU has not come to the first mark
            shares = {phase: value / total for phase, value in seconds.items()}
            self.say(f"in step {step}: {_shares(shares)} of {total:.0f} s")

    def log(self, step: int, values: dict[str, Any], **only_tracked: float) -> None:
        """Write an object to metrics.jsonl, and its numbers to the trackers.

        Those that are not finite are left out.
        """
        values = {n: v for n, v in values.items() if not isinstance(v, float) or math.isfinite(v)}
        self.lines += 1
        if any(name.startswith("eval/") for name in values):
            before = self.evaluations[1] if self.evaluations[0] == step else 0
            self.evaluations = (step, before + 1)
        self._write((json.dumps({"step": step} | values) + "\n").encode())
        tracked = values | only_tracked
        numbers = {name: x for name, x in tracked.items() if isinstance(x, int | float)}
        self.draw(step, **numbers)
        if "loss" in values:
            self._say_step(step, values)

    def _say_step(self, step: int, values: dict[str, Any]) -> None:
        """Print the line of a logged step."""
        losses = f"loss {values['loss']:.4f}  "
        losses += "  ".join(f"{k[5:]} {v:.3f}" for k, v in values.items() if k.startswith("loss/"))
        for name in ("ignored_negatives", "added_positives"):
            if values.get(name):
                losses += f"  {name.replace('_', ' ')} {values[name]}"
        if "cut/kept" in values:
            losses += f"  pairs kept {values['cut/kept']:.1%}"
        speed = f"{values['pairs_per_s']:g} pairs/s"
        if "tflops" in values:
            speed += f"  {values['tflops']:.3g} TFLOP/s"
        if "tflops" in values and "mfu" in values:
            speed += f"  MFU {values['mfu']:.0%}"
        line = f"step {step}/{self.total}  {losses.rstrip()}"
        shares = {name[5:]: x for name, x in values.items() if name.startswith("time/")}
        rest = [f"lr {values['lr']:.2e}", speed]
        if shown := _shares(shares):
            rest.append(shown)
        if self.bar.disable:
            a_step = (time.monotonic() - self.started) / max(1, step - self.first_step)
            left = a_step * (self.total - step)
            minutes, seconds = divmod(round(left), 60)
            rest.append(f"{minutes}m{seconds:02}s left")
        else:  # the bar below tells the time left; a line of the terminal's width does not wrap
            columns = shutil.get_terminal_size().columns
            free = columns - len(line) - 2
            rest = [part for part in ("  ".join(rest), speed) if len(part) < free][:1]
        self.say("  ".join([line, *rest]))

    def draw(self, step: int, **values: float) -> None:
        """Write numbers to the trackers only."""
        if values:
            self._track(
                lambda tracker: tracker.numbers(step, {tag(n): v for n, v in values.items()})
            )

    def picture(self, step: int, name: str, image: np.ndarray) -> None:
        """Give a picture, uint8 [height, width, 3], to the trackers."""
        self._track(lambda tracker: tracker.picture(step, name, image))

    def lines_at(self, step: int, evaluated: bool) -> int:
        """The number of lines of metrics.jsonl that a start from here would keep.

        Not those of an evaluation still to be done.
        """
        if evaluated or self.evaluations[0] != step:
            return self.lines
        return self.lines - self.evaluations[1]

    def flush(self, to_disk: bool = False) -> None:
        """Write the waiting lines."""
        self._write(b"", to_disk)

    def _write(self, lines: bytes, to_disk: bool = False) -> None:
        try:
            self.files.append(lines, to_disk)
        except OSError as error:
            self._tell(error)

    def _track(self, use: Callable[[trackers.Tracker], None]) -> None:
        for name, tracker in self.trackers.items():
            try:
                use(tracker)
            except tracker.errors as error:
                self._tell(error, "metrics" if name == "tensorboard" else name)

    def _tell(self, error: Exception, target: str = "metrics") -> None:
        if target not in self.told:
            self.told.add(target)
            self.say(f"warning: {target} cannot be written now: {error}")

    def close(self) -> None:
        self.flush()
        unwritten = self.files.waiting.count(b"\n")
        if unwritten:
            self.say(f"warning: the last {unwritten:,} lines of {METRICS} could not be written")
        with suppress(OSError):
            self.bar.close()
        self._track(lambda tracker: tracker.close())


def _shares(shares: Mapping[str, float]) -> str:
    return " ".join(f"{name} {x:.0%}" for name, x in shares.items() if round(x, 2))


class NullWriter:
    """The writer of all ranks but rank 0. It does nothing."""

    def say(self, *lines: str) -> None: ...
    def advance(self) -> None: ...
    def say_alive(self, step: int, so_far: Callable[[], Mapping[str, float]]) -> None: ...
    def log(self, step: int, values: dict[str, Any], **only_tracked: float) -> None: ...
    def draw(self, step: int, **values: float) -> None: ...
    def picture(self, step: int, name: str, image: np.ndarray) -> None: ...
    def flush(self, to_disk: bool = False) -> None: ...
    def close(self) -> None: ...

    def lines_at(self, step: int, evaluated: bool) -> int:
        return 0


def open_writer(
    folder: Path,
    total_steps: int,
    first_step: int,
    report_to: Sequence[str],
    callbacks: Sequence[trackers.Tracker],
) -> Writer | NullWriter:
    """The writer of this rank. Collective.

    Raises `UserError` on every rank if rank 0's cannot be opened.
    """
    writer: Writer | NullWriter = NullWriter()
    mistake = None
    if distributed.is_main():
        try:
            writer = Writer(folder, total_steps, first_step, report_to, callbacks)
        except UserError as error:
            mistake = str(error)
    distributed.raise_together(mistake)  # collective
    return writer


class Meter(Probe):
    """Measures the speed since the last logged step.

    Time in which training was interrupted does not count.
    """

    def __init__(self, engine: TrainEngine | None = None):
        """`engine`: the `TrainEngine` whose steps are timed."""
        self.timer, self.peak = StepTimer(), 0.0
        if engine is not None:
            self.measure = partial(peak_flops, engine.device, engine.dtype)
            engine.timer, self.peak = self.timer, self.measure()
        self.pairs, self.since, self.checkpoint_s = 0, time.monotonic(), 0.0

    @contextmanager
    def exchanging(self) -> Iterator[None]:
        with self.timer.inside("exchange"), super().exchanging():
            yield

    @contextmanager
    def losses(self) -> Iterator[None]:
        with self.timer.inside("loss"), super().losses():
            yield

    def pause(self, seconds: float, checkpoint: bool = False) -> None:
        self.since += seconds
        self.checkpoint_s += seconds if checkpoint else 0.0

    @contextmanager
    def paused(self) -> Iterator[None]:
        """The time spent inside does not count as training, unless an exception is raised."""
        started = time.monotonic()
        yield
        self.pause(time.monotonic() - started)

    def lap(self) -> dict[str, float]:
        """The columns of a logged step; counting begins anew. CPU-GPU sync."""
        speed = self.pairs / (time.monotonic() - self.since)
        out = {"pairs_per_s": float(f"{speed:.4g}"), "checkpoint_s": round(self.checkpoint_s, 3)}
        out |= self.timer.lap(self.peak)
        if out.get("mfu", 0) > 1:  # another program used the device while its peak was measured
            before, self.peak = self.peak, max(self.peak, self.measure())
            out["mfu"] = round(out["mfu"] * before / self.peak, 4)
        self.pairs, self.since, self.checkpoint_s = 0, time.monotonic(), 0.0
        return out


def peak_memory_bytes() -> int:
    """The most memory held so far: of the allocator on a GPU, of the process on a CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
