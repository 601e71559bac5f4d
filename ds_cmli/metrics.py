"""Writes a run's numbers to metrics.jsonl, TensorBoard and the terminal. Only rank 0 writes."""

import json
import math
import os
import resource
import shutil
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams
from tqdm import tqdm

from ds_cmli.checkpoint.run_folder import CONFIG, METRICS
from ds_cmli.common.errors import blame
from ds_cmli.common.json_text import read
from ds_cmli.common.probe import Probe
from ds_cmli.engine import TrainEngine
from ds_cmli.engine.throughput import StepTimer, peak_flops

SPEED = ("pairs_per_s", "tflops", "mfu", "checkpoint_s")
COUNTS = ("ignored_negatives", "added_positives")
OPTIMIZER = ("lr", "grad_norm", "loss_scale", "skipped_steps", *COUNTS)


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
        self.folder, self.total, self.first_step = folder, total_steps, first_step
        self.on_log = on_log
        # It follows the files that are opened later.
        self.wandb = open_wandb(folder) if report_to == "wandb" else None
        # `purge_step` hides what an interrupted run wrote after the step at which this one begins.
        self.events = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step + 1)
        self.results: dict[str, float] = {}  # the last value of each held-out metric
        if (folder / CONFIG).is_file():
            text = json.dumps(read(folder / CONFIG, dict), indent=2)
            self.events.add_text("configuration", f"```\\n{text}\\n```", first_step)
        self.started = time.monotonic()
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
                self.events.add_scalar(tag(name), value, step)
                if name.startswith("eval/"):
                    self.results[tag(name)] = value
        if "loss" in values:
            self._say_step(step, values)
        if self.on_log is not None:
            self.on_log(step, values)

    def _say_step(self, step: int, values: dict[str, Any]) -> None:
        """Print the line of a logged step."""
        parts = [f"step {step}/{self.total}", f"loss {values['loss']:.4f}"]
        parts += [f"{k[5:]} {v:.3f}" for k, v in values.items() if k.startswith("loss/")]
        for name in COUNTS:
            if values.get(name):
                parts.append(f"{name.replace('_', ' ')} {values[name]}")
        speed = [f"{values['pairs_per_s']:g} pairs/s"]
        if "tflops" in values:
            speed.append(f"{values['tflops']:.3g} TFLOP/s")
        if "mfu" in values:
            speed.append(f"MFU {values['mfu']:.0%}")
        times = ((name[5:], x) for name, x in values.items() if name.startswith("time/"))
        shares = " ".join(f"{name} {share:.0%}" for name, share in times if round(share, 2))
        line, rest = "  ".join(parts), [f"lr {values['lr']:.2e}", *speed, *filter(None, [shares])]
        if self.bar.disable:
            a_step = (time.monotonic() - self.started) / max(1, step - self.first_step)
            minutes, seconds = divmod(round(a_step * (self.total - step)), 60)
            rest.append(f"{minutes}m{seconds:02}s left")
        else:  # the bar below tells the time left; a line of the terminal's width does not wrap
            free = shutil.get_terminal_size().columns - len(line) - 2
            rest = [part for part in ("  ".join(rest), "  ".join(speed)) if len(part) < free][:1]
        self.say("  ".join([line, *rest]))

    def picture(self, step: int, name: str, image: np.ndarray) -> None:
        """Give a picture, uint8 [height, width, 3], to TensorBoard."""
        self.events.add_image(name, image, step, dataformats="HWC")

    def close(self) -> None:
        with suppress(OSError):
            self.bar.close()
        if self.results and (self.folder / CONFIG).is_file():
            for summary in hparams(run_settings(self.folder), self.results):
                self.events.file_writer.add_summary(summary)  # type: ignore[attr-defined]
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


def tag(name: str) -> str:
    """Name a column of metrics.jsonl for TensorBoard. The part before "/" is its group there."""
    group, _, rest = name.partition("/")
    if group == "eval":
        split, _, metric = rest.partition("/")
        return f"pointing-game/{split}" if "pointing" in metric else f"retrieval/{rest}"
    if name == "loss":
        return "loss/total"
    if name in SPEED or group == "time":
        return f"speed/{name}"
    if "memory" in name:
        return f"memory/{name}"
    return f"optimizer/{name}" if name in OPTIMIZER else name


def run_settings(folder: Path) -> dict[str, bool | int | float | str]:
    """The run's settings that are a number, string or boolean, its losses and its ZeRO stage."""
    content = read(folder / CONFIG, dict)
    out: dict[str, bool | int | float | str] = {
        f"{section}.{name}": value
        for section, values in content["config"].items()
        for name, value in values.items()
        if isinstance(value, bool | int | float | str)
    }
    out["losses"] = ",".join(content["config"]["loss"]["weights"])
    out["ZeRO stage"] = content.get("deepspeed", {}).get("zero_optimization", {}).get("stage", 0)
    return out


def open_wandb(folder: Path) -> Any:
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
            config=read(folder / CONFIG, dict),
            sync_tensorboard=True,
            settings=wandb.Settings(silent=True, console="off"),
        )


class Meter(Probe):
    """Measures the speed since the last logged step.

    Time in which training was interrupted does not count.
    """

    def __init__(self, engine: TrainEngine):
        """`engine`: the one whose steps are timed."""
        self.timer = engine.timer = StepTimer()
        self.peak = peak_flops(engine.device, engine.dtype)
        self.pairs, self.since, self.checkpoint_s = 0, time.monotonic(), 0.0

    @contextmanager
    def exchanging(self) -> Iterator[None]:
        with self.timer.inside("exchange"), super().exchanging():
            yield

    @contextmanager
    def losses(self) -> Iterator[None]:
        with self.timer.inside("loss"), super().losses():
            yield

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
