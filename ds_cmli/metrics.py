"""Writes a run's numbers to metrics.jsonl, TensorBoard and the terminal. Only rank 0 writes."""

import json
import math
import os
import resource
import shutil
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams
from tqdm import tqdm

from ds_cmli.checkpoint.run_folder import METRICS
from ds_cmli.common.errors import UserError, one_line
from ds_cmli.common.json_text import read
from ds_cmli.common.probe import Probe
from ds_cmli.distributed import process_group as distributed
from ds_cmli.engine import TrainEngine
from ds_cmli.engine.throughput import StepTimer, peak_flops

ALIVE_SECONDS = 10  # within a step nothing is printed more often
Scalar = bool | int | float | str
Hook = Callable[[threading.ExceptHookArgs], object]
SPEED = ("pairs_per_s", "tflops", "mfu", "checkpoint_s")
RESULTS = ("retrieval/", "pointing-game/")  # groups of held-out metrics
OPTIMIZER = (
    "lr",
    "grad_norm",
    "loss_scale",
    "skipped_steps",
    "ignored_negatives",
    "added_positives",
)


class Writer:
    """Writes a run's numbers: to `metrics.jsonl`, to TensorBoard, and to the terminal.

    There it is a progress bar, or plain lines if it is no terminal.

    If the disk is full, what cannot be written is lost, and the run goes on.
    """

    def __init__(
        self,
        folder: Path,
        total_steps: int,
        first_step: int = 0,
        report_to: str = "tensorboard",
    ):
        """Raises `UserError` if `report_to` is "wandb", and that cannot be opened."""
        self.path, self.told = folder / METRICS, False
        # It follows the files that are opened later.
        self.wandb = open_wandb(folder) if report_to == "wandb" else None
        self.tensorboard = TensorBoard(folder, first_step)
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
        """Write an object to metrics.jsonl, and its numbers to TensorBoard.

        Those that are not finite are left out.
        """
        values = {n: v for n, v in values.items() if not isinstance(v, float) or math.isfinite(v)}
        line = json.dumps({"step": step} | values) + "\n"
        self._track(lambda: self._append(line))
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
        """Write numbers to TensorBoard only."""
        if values:
            self._track(lambda: self.tensorboard.numbers(step, values))

    def picture(self, step: int, name: str, image: np.ndarray) -> None:
        """Give a picture, uint8 [height, width, 3], to TensorBoard."""
        self._track(lambda: self.tensorboard.picture(step, name, image))

    def flush(self) -> None:
        """Sync the lines to disk."""
        self._track(lambda: self._append("", to_disk=True))

    def _append(self, line: str, to_disk: bool = False) -> None:
        with open(self.path, "a") as file:
            file.write(line)
            if to_disk:
                os.fsync(file.fileno())

    def _track(self, use: Callable[[], object]) -> None:
        try:
            use()
        except OSError as error:
            self._tell(error)

    def _tell(self, error: Exception) -> None:
        if not self.told:
            self.told = True
            self.say(f"warning: metrics cannot be written now: {error}")

    def close(self) -> None:
        with suppress(OSError):
            self.bar.close()
        self._track(self.tensorboard.close)
        if self.wandb is not None:
            self.wandb.finish()


class TensorBoard:
    """Scalars, match maps, the configuration and an entry of the HParams panel in the run's folder.

    The event file is opened at the first value, and anew after an error such as a full disk.

    Values are lost by such an error.
    """

    def __init__(self, folder: Path, first_step: int):
        self.folder, self.first_step = folder, first_step
        self.events: SummaryWriter | None = None
        self.results: dict[str, float] = {}  # the last value of each held-out metric
        threading.excepthook = _without_full_disks(threading.excepthook)

    def numbers(self, step: int, values: dict[str, float]) -> None:
        tagged = {tag(name): value for name, value in values.items()}
        self.results |= {name: x for name, x in tagged.items() if name.startswith(RESULTS)}
        with self._opened(step) as events:
            for name, value in tagged.items():
                events.add_scalar(name, value, step)

    def picture(self, step: int, name: str, image: np.ndarray) -> None:
        with self._opened(step) as events:
            events.add_image(name, image, step, dataformats="HWC")

    def close(self) -> None:
        if self.events is None:
            return
        if self.results and (self.folder / "run.json").is_file():
            for summary in hparams(run_settings(self.folder), self.results):
                self.events.file_writer.add_summary(summary)  # type: ignore[attr-defined]
        self.events.close()

    @contextmanager
    def _opened(self, step: int) -> Iterator[SummaryWriter]:
        try:
            if self.events is None:
                # `purge_step` hides what an interrupted run wrote after the step from which this
                # one resumes.
                self.events = SummaryWriter(
                    str(self.folder / "tensorboard"), purge_step=min(step, self.first_step + 1)
                )
                self.events.add_text("configuration", configuration(self.folder), step)
            yield self.events
        except OSError:
            self.events = None
            raise


def _without_full_disks(hook: Hook) -> Hook:
    """Make an excepthook that prints no traceback if TensorBoard's thread meets a full disk.

    The next use of the thread raises the same error.
    """

    def told_later(failure: threading.ExceptHookArgs) -> None:
        if not (
            type(failure.thread).__name__ == "_AsyncWriterThread"
            and isinstance(failure.exc_value, OSError)
        ):
            hook(failure)

    return told_later


def tag(name: str) -> str:
    """Name a column of metrics.jsonl for TensorBoard. The part before "/" is its group there."""
    group, _, rest = name.partition("/")
    if group == "eval":
        split, _, metric = rest.partition("/")
        if "pointing" in metric:
            return f"pointing-game/{split}"
        return f"retrieval/{split}/{metric}"
    if name == "loss":
        return "loss/total"
    if name in SPEED or group == "time":
        return f"speed/{name}"
    if "memory" in name:
        return f"memory/{name}"
    return f"optimizer/{name}" if name in OPTIMIZER else name


def configuration(folder: Path) -> str:
    """The run's `run.json` and, if there is one, its `memory.json`, as Markdown."""
    parts = []
    for name in ("run.json", "memory.json"):
        with suppress(OSError, ValueError):  # memory.json may be missing, or an earlier start's
            text = json.dumps(read(folder / name, dict), indent=2)
            parts.append(f"## {name}\n\n" + "\n".join(f"    {line}" for line in text.splitlines()))
    return "\n\n".join(parts)


def run_settings(folder: Path) -> dict[str, Scalar]:
    """The run's settings that are a number, string or boolean, its losses and its ZeRO stage."""
    content = read(folder / "run.json", dict)
    sections = content["config"]
    out: dict[str, Scalar] = {
        f"{section}.{name}": value
        for section, values in sections.items()
        for name, value in values.items()
        if isinstance(value, bool | int | float | str)
    }
    out["losses"] = ",".join(sections["loss"]["weights"])
    out["ZeRO stage"] = content.get("deepspeed", {}).get("zero_optimization", {}).get("stage", 0)
    return out


def open_wandb(folder: Path) -> Any:
    """Send what TensorBoard gets to Weights & Biases too; a run that goes on stays one run there.

    Raises `UserError` if it cannot be opened.
    """
    import wandb

    name = folder / "wandb" / "run-id"
    try:
        if not name.is_file():
            name.parent.mkdir(exist_ok=True)
            name.write_text(uuid.uuid4().hex[:12])
        return wandb.init(
            project=os.environ.get("WANDB_PROJECT", "ds-cmli"),
            name=folder.resolve().name,
            id=name.read_text().strip(),
            resume="allow",
            dir=str(folder),
            config=read(folder / "run.json", dict),
            sync_tensorboard=True,
            settings=wandb.Settings(silent=True, console="off"),
        )
    except (OSError, wandb.Error) as error:
        raise UserError(
            f"run.report_to is 'wandb', which cannot be opened: {one_line(error)}: "
            "see `wandb login`, or WANDB_MODE=offline"
        ) from None


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
    def flush(self) -> None: ...
    def close(self) -> None: ...


def open_writer(
    folder: Path,
    total_steps: int,
    first_step: int,
    report_to: str,
) -> Writer | NullWriter:
    """The writer of this rank. Collective.

    Raises `UserError` on every rank if rank 0's cannot be opened.
    """
    writer: Writer | NullWriter = NullWriter()
    mistake = None
    if distributed.is_main():
        try:
            writer = Writer(folder, total_steps, first_step, report_to)
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
