"""Writes a run's numbers to metrics.jsonl, TensorBoard, Weights & Biases and the terminal.

If a file cannot be written, for instance to a full disk, the run warns once and goes on. Its
checkpoints decide how it ends.
"""

import json
import math
import os
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from ds_cmli.checkpoint.storage import METRICS, RUN_RECORD
from ds_cmli.errors import blame, one_line


class Writer:
    """Writes a run's numbers; on a terminal with a progress bar, elsewhere with the time left."""

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
        self.folder = folder
        self.total_steps = total_steps
        self.on_log = on_log
        self.has_warned = False
        settings = json.loads((folder / RUN_RECORD).read_text())
        # Weights & Biases follows the files of TensorBoard that are opened later.
        self.wandb = open_wandb(folder, settings) if report_to == "wandb" else None
        self.previous_hook = threading.excepthook
        threading.excepthook = self._on_thread_error
        self.events: SummaryWriter | NullWriter = NullWriter()  # while it cannot be written
        self._open_events(first_step + 1)
        with self._warned("TensorBoard's file"):
            text = json.dumps(settings, indent=2)
            self.events.add_text("configuration", f"```\n{text}\n```", first_step)
        # The first step, which compiles and fills caches, says nothing of the time that is left.
        self.timed_from_step = first_step + 1
        self.timed_since = math.inf
        self.bar = tqdm(total=total_steps, initial=first_step, unit="step", disable=None)

    def print(self, *lines: str) -> None:
        for line in lines:
            # The terminal or the launcher may be gone, and the run still has to be saved.
            with suppress(OSError):
                tqdm.write(line, file=sys.stdout)
                sys.stdout.flush()

    def advance(self) -> None:
        """Count a step."""
        self.timed_since = min(self.timed_since, time.monotonic())
        self.bar.update()

    def log(self, step: int, values: dict[str, Any]) -> None:
        """Write the finite values to metrics.jsonl, and the numbers among them to TensorBoard."""
        values = {k: v for k, v in values.items() if not isinstance(v, float) or math.isfinite(v)}
        with self._warned(METRICS):
            self._append(json.dumps({"step": step} | values) + "\n")
        self._open_events(step)
        with self._warned("TensorBoard's file"):
            for name, value in values.items():
                # Chance is constant: in TensorBoard it would be the first seven charts.
                if isinstance(value, int | float) and "/chance/" not in name:
                    # TensorBoard groups by what precedes the "/".
                    tag = "loss/total" if name == "loss" else name
                    tag = tag if "/" in tag else f"train/{tag}"
                    self.events.add_scalar(tag, value, step)
        if "loss" in values:
            self.print(self._terminal_line(step, values))
        if self.on_log is not None:
            self.on_log(step, values)

    def picture(self, step: int, name: str, image: np.ndarray) -> None:
        """Give a picture, uint8 [height, width, 3], to TensorBoard."""
        with self._warned("TensorBoard's file"):
            self.events.add_image(name, image, step, dataformats="HWC")

    def close(self) -> None:
        self.bar.close()
        with self._warned("TensorBoard's file"):
            self.events.close()
        if self.wandb is not None:
            self.wandb.finish()
        threading.excepthook = self.previous_hook

    def _append(self, line: str) -> None:
        """Add a line to metrics.jsonl, or nothing of it. Raises OSError."""
        path = self.folder / METRICS
        size = path.stat().st_size if path.exists() else 0
        try:
            with open(path, "a") as file:
                file.write(line)
        except OSError:
            with suppress(OSError):
                os.truncate(path, size)
            raise

    def _terminal_line(self, step: int, values: dict[str, Any]) -> str:
        parts = [f"step {step}/{self.total_steps}", f"loss {values['loss']:.4f}"]
        parts += [f"{k[5:]} {v:.3f}" for k, v in values.items() if k.startswith("loss/")]
        parts += [f"lr {values['lr']:.2e}", f"{values['pairs_per_s']:g} pairs/s"]
        if "mfu" in values:
            parts.append(f"MFU {values['mfu']:.0%}")
        if values["time/data"] >= 0.01:
            parts.append(f"data {values['time/data']:.0%}")
        num_timed = step - self.timed_from_step
        if self.bar.disable and num_timed > 0:
            seconds_per_step = (time.monotonic() - self.timed_since) / num_timed
            minutes, seconds = divmod(round(seconds_per_step * (self.total_steps - step)), 60)
            parts.append(f"{minutes}m{seconds:02}s left")
        return "  ".join(parts)

    @contextmanager
    def _warned(self, name: str) -> Iterator[None]:
        """Turn an error of writing inside into the run's one warning about it."""
        try:
            yield
        except OSError as error:
            if name != METRICS:
                self.events = NullWriter()  # the thread that writes it has ended
            if not self.has_warned:
                self.print(
                    f"warning: {name} cannot be written ({error.strerror or one_line(error)}): "
                    "the run goes on without what it logs meanwhile"
                )
            self.has_warned = True

    def _open_events(self, step: int) -> None:
        """Open TensorBoard's file for the steps from `step` on, unless it is open."""
        if isinstance(self.events, NullWriter):
            with self._warned("TensorBoard's file"):
                # `purge_step` hides what an interrupted run wrote from that step on.
                self.events = SummaryWriter(str(self.folder / "tensorboard"), purge_step=step)

    def _on_thread_error(self, error: threading.ExceptHookArgs) -> None:
        """Print the traceback of a thread that fails, unless it writes TensorBoard's file.

        TensorBoard raises the error of its thread again when it is given the next number.
        """
        is_tensorboard = type(error.thread).__module__.startswith("tensorboard.")
        if not (is_tensorboard and isinstance(error.exc_value, OSError)):
            self.previous_hook(error)


class NullWriter:
    """Writes nothing: on all ranks except rank 0, and while TensorBoard has no file."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *arguments, **named: None


def open_wandb(folder: Path, settings: dict[str, Any]) -> Any:
    """Send what TensorBoard gets to Weights & Biases too; a run that goes on stays one run there.

    Raises `UserError` if it cannot be opened.
    """
    with blame("run.report_to is 'wandb': see `wandb login`, or WANDB_MODE=offline"):
        import wandb

        id_file = folder / "wandb" / "run-id"
        if not id_file.is_file():
            id_file.parent.mkdir(exist_ok=True)
            id_file.write_text(uuid.uuid4().hex[:12])
        return wandb.init(
            project=os.environ.get("WANDB_PROJECT", "ds-cmli"),
            name=folder.resolve().name,
            id=id_file.read_text().strip(),
            resume="allow",
            dir=os.environ.get("WANDB_DIR", str(folder)),
            config=settings,
            sync_tensorboard=True,
            settings=wandb.Settings(silent=True, console="off"),
        )
