"""Writes a run's numbers to metrics.jsonl, TensorBoard and the terminal. Only rank 0 writes."""

import json
import math
import os
import resource
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from ds_cmli.checkpoint.run_folder import CONFIG, METRICS
from ds_cmli.common.errors import blame
from ds_cmli.engine import TrainEngine
from ds_cmli.engine.throughput import StepTimer, peak_flops

COUNTS = ("ignored_negatives", "added_positives")


class Writer:
    """Writes a run's numbers to `metrics.jsonl`, to TensorBoard, and to the terminal.

    There it is a progress bar, or plain lines if it is no terminal.
    """

    def __init__(
        self,
        folder: Path,
        total_steps: int,
        first_step: int = 0,
        report_to: str = "tensorboard",
        on_log: Callable[[int, dict[str, Any]], object] | None = None,
    ):
        """Raises `UserError` if `report_to` is "wandb", and that cannot be opened.

        `on_log` is called with the step and the columns of each line of metrics.jsonl.
        """
        self.folder, self.total, self.on_log = folder, total_steps, on_log
        settings = json.loads((folder / CONFIG).read_text())
        # It follows the files that are opened later.
        self.wandb = open_wandb(folder, settings) if report_to == "wandb" else None
        # `purge_step` hides what an interrupted run wrote after the step at which this one begins.
        self.events = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step + 1)
        text = json.dumps(settings, indent=2)
        self.events.add_text("configuration", f"```\\n{text}\\n```", first_step)
        # The first step, which compiles and fills caches, says nothing of the time that is left.
        self.timed_from, self.since = first_step + 1, math.inf
        self.bar = tqdm(
            total=total_steps,
            initial=first_step,
            unit="step",
            dynamic_ncols=True,
            disable=not sys.stderr.isatty(),
        )

    def say(self, *lines: str) -> None:
        for line in lines:
            # The terminal or the launcher may be gone, and the run still has to be saved.
            with suppress(OSError):
                tqdm.write(line, file=sys.stdout)
                sys.stdout.flush()

    def advance(self) -> None:
        """Count a step."""
        self.since = min(self.since, time.monotonic())
        with suppress(OSError):
            self.bar.update()

    def log(self, step: int, values: dict[str, Any], **only_tracked: float) -> None:
        """Write an object to metrics.jsonl, and its numbers to TensorBoard.

        Those that are not finite are left out.
        """
        values = {n: v for n, v in values.items() if not isinstance(v, float) or math.isfinite(v)}
        with open(self.folder / METRICS, "a") as file:
            file.write(json.dumps({"step": step} | values) + "\n")
        for name, value in (values | only_tracked).items():
            if isinstance(value, int | float):
                # TensorBoard groups by what precedes the "/".
                tag = "loss/total" if name == "loss" else name if "/" in name else f"train/{name}"
                self.events.add_scalar(tag, value, step)
        if "loss" in values:
            self.say(self._line(step, values))
        if self.on_log is not None:
            self.on_log(step, values)

    def _line(self, step: int, values: dict[str, Any]) -> str:
        """The terminal's line of a logged step."""
        parts = [f"step {step}/{self.total}", f"loss {values['loss']:.4f}"]
        parts += [f"{k[5:]} {v:.3f}" for k, v in values.items() if k.startswith("loss/")]
        parts += [f"{name.replace('_', ' ')} {values[name]}" for name in COUNTS if values.get(name)]
        parts += [f"lr {values['lr']:.2e}", f"{values['pairs_per_s']:g} pairs/s"]
        if "tflops" in values:
            parts.append(f"{values['tflops']:.3g} TFLOP/s")
        if "mfu" in values:
            parts.append(f"MFU {values['mfu']:.0%}")
        times = {k[5:]: v for k, v in values.items() if k.startswith("time/") and round(v, 2)}
        if times:
            parts.append(" ".join(f"{phase} {share:.0%}" for phase, share in times.items()))
        if self.bar.disable and step > self.timed_from:  # the bar tells the time left
            a_step = (time.monotonic() - self.since) / (step - self.timed_from)
            minutes, seconds = divmod(round(a_step * (self.total - step)), 60)
            parts.append(f"{minutes}m{seconds:02}s left")
        return "  ".join(parts)

    def picture(self, step: int, name: str, image: np.ndarray) -> None:
        """Give a picture, uint8 [height, width, 3], to TensorBoard."""
        self.events.add_image(name, image, step, dataformats="HWC")

    def close(self) -> None:
        with suppress(OSError):
            self.bar.close()
        self.events.close()
        if self.wandb is not None:
            self.wandb.finish()


class NullWriter:
    """The writer of all ranks but rank 0. It does nothing."""

    def say(self, *lines: str) -> None: ...
    def advance(self) -> None: ...
    def log(self, step: int, values: dict[str, Any], **only_tracked: float) -> None: ...
    def picture(self, step: int, name: str, image: np.ndarray) -> None: ...
    def close(self) -> None: ...


def open_wandb(folder: Path, settings: dict[str, Any]) -> Any:
    """Send what TensorBoard gets to Weights & Biases too; a run that goes on stays one run there.

    Raises `UserError` if it cannot be opened.
    """
    with blame("run.report_to is 'wandb': see `wandb login`, or WANDB_MODE=offline"):
        import wandb

        name = folder / "wandb" / "run-id"
        if not name.is_file():
            name.parent.mkdir(exist_ok=True)
            name.write_text(uuid.uuid4().hex[:12])
        return wandb.init(
            project=os.environ.get("WANDB_PROJECT", "ds-cmli"),
            name=folder.resolve().name,
            id=name.read_text().strip(),
            resume="allow",
            dir=str(folder),
            config=settings,
            sync_tensorboard=True,
            settings=wandb.Settings(silent=True, console="off"),
        )


class Meter:
    """Measures the speed since the last logged step.

    Time in which training was interrupted does not count.
    """

    def __init__(self, engine: TrainEngine):
        """`engine`: the one whose steps are timed."""
        self.timer = engine.timer = StepTimer()
        self.peak = peak_flops(engine.device, engine.dtype)
        self.pairs, self.since, self.checkpoint_s = 0, time.monotonic(), 0.0

    def scope(self, name: str) -> AbstractContextManager[None]:
        """Time a scope of the `probe` that is a phase."""
        phase = {"losses": "loss", "exchange": "exchange"}.get(name)
        return self.timer.inside(phase) if phase else nullcontext()

    @contextmanager
    def paused(self, checkpoint: bool = False) -> Iterator[None]:
        """The time spent inside does not count as training, unless an exception is raised."""
        started = time.monotonic()
        yield
        seconds = time.monotonic() - started
        self.since += seconds
        self.checkpoint_s += seconds if checkpoint else 0.0

    def lap(self) -> dict[str, float]:
        """The columns of a logged step; counting begins anew. CPU-GPU sync."""
        speed = self.pairs / (time.monotonic() - self.since)
        out = {"pairs_per_s": float(f"{speed:.4g}"), "checkpoint_s": round(self.checkpoint_s, 3)}
        self.pairs, self.since, self.checkpoint_s = 0, time.monotonic(), 0.0
        return out | self.timer.lap(self.peak)


def peak_memory_bytes() -> int:
    """The most memory held so far: of the allocator on a GPU, of the process on a CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
