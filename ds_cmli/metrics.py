"""Writes a run's numbers to metrics.jsonl, TensorBoard and the terminal. Only rank 0 writes."""

import json
import math
import os
import resource
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from ds_cmli.checkpoint.run_folder import CONFIG, METRICS
from ds_cmli.common import blame
from ds_cmli.config.registry import compares_tokens
from ds_cmli.data.batch import Batch
from ds_cmli.distributed.process_group import world_size
from ds_cmli.engine import TrainEngine

# Operators that PyTorch's counter of FLOPs does not know by itself, given their inputs' shapes.
ON_CPU: dict[Any, Callable[..., int]] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: (
        lambda query, key, value, *_, **__: sdpa_flop_count(query, key, value)
    ),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda grad, query, key, value, *_, **__: sdpa_backward_flop_count(grad, query, key, value)
    ),
}
LEAST_MFU = 0.005  # what would be shown as 0% is left out: such steps do not wait for products
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

    def __init__(self, engine: TrainEngine, counts: bool = True):
        """`counts`: whether FLOPs are counted, which those of compiled code cannot be."""
        self.engine, self.peak = engine, peak_flops(engine.device, engine.dtype)
        self.flops = None if counts else 0.0  # of a step of this rank; None: not known yet
        self._restart()

    def _restart(self) -> None:
        self.pairs = self.steps = 0
        self.since, self.data_s, self.checkpoint_s = time.monotonic(), 0.0, 0.0

    @contextmanager
    def step(self, micro_batches: Sequence[Batch]) -> Iterator[None]:
        """Enter a step; the FLOPs of the first one are counted, and taken for those of each."""
        self.steps += 1
        if self.flops is not None:
            yield
            return
        with FlopCounterMode(display=False, custom_mapping=ON_CPU) as counter:
            yield
        of_pairs = sum(all_pairs_flops(self.engine, batch) for batch in micro_batches)
        self.flops = float(counter.get_total_flops() + of_pairs)

    @contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        started = time.monotonic()
        yield
        self.data_s += time.monotonic() - started

    @contextmanager
    def paused(self, checkpoint: bool = False) -> Iterator[None]:
        """The time spent inside does not count as training, unless an exception is raised."""
        started = time.monotonic()
        yield
        seconds = time.monotonic() - started
        self.since += seconds
        self.checkpoint_s += seconds if checkpoint else 0.0

    def lap(self) -> dict[str, float]:
        """The columns of a logged step, MFU from `LEAST_MFU` on; counting begins anew."""
        seconds = time.monotonic() - self.since
        out = {
            "pairs_per_s": float(f"{self.pairs / seconds:.4g}"),
            "checkpoint_s": round(self.checkpoint_s, 3),
            "time/data": round(self.data_s / seconds, 4),
        }
        flops = (self.flops or 0.0) * self.steps / seconds
        if flops:
            out["tflops"] = float(f"{flops / 1e12:.4g}")
            if flops / self.peak >= LEAST_MFU:
                out["mfu"] = round(flops / self.peak, 4)
        self._restart()
        return out


def all_pairs_flops(engine: TrainEngine, batch: Batch) -> int:
    """FLOPs of the all-pairs kernels, into which PyTorch's counter does not see.

    They are those of the similarities, and as many again for the gradient of each side.
    """
    objective = engine.objective
    tokens = compares_tokens(objective.config.weights)
    if not tokens or objective.config.cmli_backend == "torch":  # which is seen
        return 0
    (B, M), N, D = batch.input_ids.shape, objective.student.grid, objective.student.embed_dim
    G = B * world_size() * (engine.accumulation if engine.caching else 1)
    return 3 * 2 * B * G * math.prod(N) * M * D


@cache
def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of the fastest matrix product of half a second on this device, or of a tenth on a CPU,
    measured once in a process. CPU-GPU sync.

    A GPU's allocator returns all free memory, the product's too, which is no part of a step.
    """
    size, duration_s = (4096, 0.5) if device.type == "cuda" else (512, 0.1)  # a GPU's clocks rise
    x = torch.ones(size, size, device=device, dtype=dtype)
    weight = torch.ones_like(x)
    best, end = math.inf, time.perf_counter() + duration_s
    while time.perf_counter() < end or best == math.inf:
        started = time.perf_counter()
        torch.nn.functional.linear(x, weight)
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    del x, weight
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return 2.0 * size**3 / best


def peak_memory_bytes() -> int:
    """The most memory held so far: of the allocator on a GPU, of the process on a CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
