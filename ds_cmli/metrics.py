"""A run's numbers: measured, and written to metrics.jsonl, TensorBoard and the terminal."""

import json
import math
import os
import resource
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from ds_cmli.checkpoint.storage import METRICS, RUN_RECORD
from ds_cmli.config.registry import compares_tokens
from ds_cmli.data.pairs import Batch
from ds_cmli.distributed.process_group import world_size
from ds_cmli.engine import TrainEngine
from ds_cmli.errors import blame


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
        self.folder, self.total, self.on_log = folder, total_steps, on_log
        settings = json.loads((folder / RUN_RECORD).read_text())
        # It follows the files that are opened later.
        self.wandb = open_wandb(folder, settings) if report_to == "wandb" else None
        # `purge_step` hides what an interrupted run wrote after the step at which this one begins.
        self.events = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step + 1)
        text = json.dumps(settings, indent=2)
        self.events.add_text("configuration", f"```\n{text}\n```", first_step)
        # The first step, which compiles and fills caches, says nothing of the time that is left.
        self.timed_from, self.since = first_step + 1, math.inf
        self.bar = tqdm(total=total_steps, initial=first_step, unit="step", disable=None)

    def say(self, *lines: str) -> None:
        for line in lines:
            # The terminal or the launcher may be gone, and the run still has to be saved.
            with suppress(OSError):
                tqdm.write(line, file=sys.stdout)
                sys.stdout.flush()

    def advance(self) -> None:
        """Count a step."""
        self.since = min(self.since, time.monotonic())
        self.bar.update()

    def log(self, step: int, values: dict[str, Any]) -> None:
        """Write what is finite of the values to metrics.jsonl, and its numbers to TensorBoard."""
        values = {n: v for n, v in values.items() if not isinstance(v, float) or math.isfinite(v)}
        with open(self.folder / METRICS, "a") as file:
            file.write(json.dumps({"step": step} | values) + "\n")
        for name, value in values.items():
            if isinstance(value, int | float):
                # TensorBoard groups by what precedes the "/".
                tag = "loss/total" if name == "loss" else name if "/" in name else f"train/{name}"
                self.events.add_scalar(tag, value, step)
        if "loss" in values:
            parts = [f"step {step}/{self.total}", f"loss {values['loss']:.4f}"]
            parts += [f"{k[5:]} {v:.3f}" for k, v in values.items() if k.startswith("loss/")]
            parts += [f"lr {values['lr']:.2e}", f"{values['pairs_per_s']:g} pairs/s"]
            if "mfu" in values:
                parts.append(f"MFU {values['mfu']:.0%}")
            if values["time/data"] >= 0.01:
                parts.append(f"data {values['time/data']:.0%}")
            if self.bar.disable and step > self.timed_from:
                a_step = (time.monotonic() - self.since) / (step - self.timed_from)
                minutes, seconds = divmod(round(a_step * (self.total - step)), 60)
                parts.append(f"{minutes}m{seconds:02}s left")
            self.say("  ".join(parts))
        if self.on_log is not None:
            self.on_log(step, values)

    def picture(self, step: int, name: str, image: np.ndarray) -> None:
        """Give a picture, uint8 [height, width, 3], to TensorBoard."""
        self.events.add_image(name, image, step, dataformats="HWC")

    def close(self) -> None:
        self.bar.close()
        self.events.close()
        if self.wandb is not None:
            self.wandb.finish()


class NullWriter:
    """The writer of all ranks but rank 0, whose methods do nothing."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *arguments: None


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
    """Measures the speed since the last logged step, without the time of what interrupts training.

    FLOPs are those of the model: the products of its forward passes, without what checkpointing and
    gradient caching compute again, and of the student as many again for the gradients of either
    factor, as though none of it were frozen.
    """

    def __init__(self, engine: TrainEngine, counts: bool = True):
        """`counts`: whether FLOPs are counted, which those of compiled code cannot be."""
        self.engine, self.peak = engine, peak_flops(engine.device, engine.dtype) if counts else 0.0
        self.flops = None if counts else 0  # of a step of this rank; None: not known yet
        self._restart()

    def _restart(self) -> None:
        self.pairs = self.steps = 0
        self.since, self.seconds = time.monotonic(), {"data": 0.0, "paused": 0.0}

    @contextmanager
    def step(self, micro_batches: Sequence[Batch]) -> Iterator[None]:
        """Enter a step; the FLOPs of the first one are counted, and taken for those of each."""
        self.steps += 1
        with ExitStack() as stack:
            if self.flops is None:
                self.flops = sum(all_pairs_flops(self.engine, batch) for batch in micro_batches)
                for module, times in ((self.engine.objective, 3), (self.engine.teacher, 1)):
                    if module is not None:
                        counted = partial(self._counted, module.forward, times)
                        stack.enter_context(mock.patch.object(module, "forward", counted))
            yield

    def _counted(self, forward: Callable, times: int, *arguments: Any, **named: Any) -> Any:
        if named.get("embed"):  # gradient caching computes these features again
            return forward(*arguments, **named)
        with FlopCounterMode(display=False) as counter:
            result = forward(*arguments, **named)
        self.flops = (self.flops or 0) + times * counter.get_total_flops()
        return result

    @contextmanager
    def timed(self, kind: str) -> Iterator[None]:
        """Time the wait for "data", or what is no training ("paused")."""
        started = time.monotonic()
        yield
        self.seconds[kind] += time.monotonic() - started

    def lap(self) -> dict[str, float]:
        """The columns of a logged step; counting begins anew."""
        seconds = time.monotonic() - self.since - self.seconds["paused"]
        # Of the allocator on a GPU, of the process on a CPU.
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        if self.engine.device.type == "cuda":
            memory = torch.cuda.max_memory_allocated()
        out = {
            "pairs_per_s": float(f"{self.pairs / seconds:.4g}"),
            "time/data": round(self.seconds["data"] / seconds, 4),
            "peak_memory_bytes": memory,
        }
        if self.flops:
            flops = self.flops * self.steps / seconds
            out["tflops"] = float(f"{flops / 1e12:.4g}")
            out["mfu"] = round(flops / self.peak, 4)
        self._restart()
        return out


def all_pairs_flops(engine: TrainEngine, batch: Batch) -> int:
    """FLOPs of the all-pairs kernels, into which PyTorch's counter does not see.

    They are those of the similarities, and as many again for the gradient of each side.
    """
    objective = engine.objective
    seen = objective.config.cmli_backend == "torch" and not engine.caching
    if seen or not compares_tokens(objective.config.weights):
        return 0
    (B, M), N, D = batch.input_ids.shape, objective.student.grid, objective.student.embed_dim
    G = B * world_size() * (engine.accumulation if engine.caching else 1)
    return 3 * 2 * B * G * math.prod(N) * M * D


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product on this GPU, measured for half a second."""
    from torch.utils.benchmark import Timer

    x = torch.ones(4096, 4096, device=device, dtype=dtype)
    product = Timer("linear(x, x)", globals={"linear": torch.nn.functional.linear, "x": x})
    seconds = product.blocked_autorange(min_run_time=0.5).median
    del x, product
    torch.cuda.empty_cache()  # what the product has taken is no part of a step
    return 2 * 4096**3 / seconds
