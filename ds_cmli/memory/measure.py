"""Compares measured and predicted memory of a run's first steps (`--profile-memory`).

On a GPU the totals are the allocator's own. The categories come from the tracker that predictions
use, here on real tensors; what the allocator counts beyond the tracker (the workspaces of libraries
and operators) is added to "temporaries".
"""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import accumulate
from pathlib import Path

import torch
from torch import nn

from ds_cmli.common.cli import say
from ds_cmli.common.errors import UserError
from ds_cmli.common.json_text import JsonObject
from ds_cmli.config.deepspeed_config import DeepSpeedConfig
from ds_cmli.config.schema import Config
from ds_cmli.distributed import process_group as distributed
from ds_cmli.engine import TrainEngine
from ds_cmli.memory import cpu_events, predict_subprocess
from ds_cmli.memory.report import Report, summarise
from ds_cmli.memory.tracker import MemoryTracker
from ds_cmli.memory_model import gpus

PREDICTION_S = 600  # the most seconds that the ranks wait for the prediction
FILE, SNAPSHOT = "memory.json", "memory-snapshot.pickle"
# By part of the report and figure: "bytes" and "ratio".
Differences = dict[str, dict[str, dict[str, float]]]


def differences(predicted: JsonObject, measured: JsonObject) -> Differences:
    """Predicted minus measured bytes and their ratio, for every figure that both reports have.

    The reports are as `Report.to_dict` returns them.
    """
    out: Differences = {}
    for part in ("totals", "phases", "categories"):
        out[part] = {}
        for name in predicted[part]:
            if name not in measured[part]:
                continue
            ours, theirs = predicted[part][name], measured[part][name]
            out[part][name] = {"bytes": ours - theirs}
            if theirs:
                out[part][name]["ratio"] = ours / theirs
    return out


@contextmanager
def profiling_memory(
    steps: int | None,
    train_engine: TrainEngine,
    config: Config,
    ds_config: DeepSpeedConfig,
    folder: Path,
) -> Iterator[Callable[[], None]]:
    """Measure the first `steps` optimizer steps of the training loop inside.

    Yields a function to call after each step. After the last of these steps rank 0 writes
    `folder/memory.json`: prediction, measurement and their differences; on CUDA also the
    allocator's history, for pytorch.org/memory_viz. The prediction is made in a separate process,
    for texts of the lengths that were measured, while all ranks wait. Collective.

    Args:
        steps: None: nothing is measured. With 1, the optimizer's states do not exist yet at the
            peak.
        ds_config: as `engine.build` took it.
    """
    if steps is None:
        yield lambda: None
        return
    ranks, target = distributed.world_size(), train_engine.device.type
    setting = {"preset": config.run.preset, "steps": steps, "world_size": ranks}
    name = torch.cuda.get_device_name(train_engine.device) if target == "cuda" else ""
    done = 0
    with Measurement(train_engine) as measurement:

        def after_step() -> None:
            nonlocal done
            done += 1
            if done != steps:
                return
            measurement.close()
            # Collective.
            texts = list(zip(*distributed.gather_objects(measurement.texts), strict=True))
            if distributed.is_main():
                request = predict_subprocess.Request(config, ds_config, ranks, target, texts=texts)
                _write(folder, _predicted(request, name), measurement.report(setting))
            if target == "cuda":
                record_history()  # back to the history that every training run keeps

        yield after_step


def _predicted(
    request: predict_subprocess.Request, name: str
) -> predict_subprocess.PredictionAnswer:
    """The prediction for this GPU, called `name`, and for no other in its place."""
    try:
        gpu = gpus.present(name).name if name else ""
    except UserError as error:
        say(f"warning: the memory is measured and not predicted: {error}")
        return predict_subprocess.PredictionAnswer(None, str(error))
    with predict_subprocess.Predictor(PREDICTION_S) as predictor:
        return predictor.ask(replace(request, gpu=gpu))


class Measurement:
    """Measures the memory of the training steps inside, up to `close`."""

    def __init__(self, train_engine: TrainEngine):
        self.train_engine = train_engine
        self.texts: list[tuple[int, list[int]]] = []  # text lengths of this rank's micro-batches
        self.tracker = MemoryTracker(train_engine.device.type)
        self.totals: dict[str, int] = {}
        self._measuring = ExitStack()

    def __enter__(self) -> "Measurement":
        objective = self.train_engine.objective
        noting = objective.register_forward_pre_hook(self._note_texts, with_kwargs=True)
        self._measuring.enter_context(noting)
        cuda = self.train_engine.device.type == "cuda"
        self._measuring.enter_context(self._on_cuda() if cuda else self._on_cpu())
        return self

    def __exit__(self, *error: object) -> None:
        self._measuring.__exit__(*error)  # type: ignore[arg-type]

    def close(self) -> None:
        self._measuring.close()

    def report(self, setting: JsonObject) -> Report:
        """The report of the steps that were measured; `setting` says what they are."""
        device = self.train_engine.device
        cuda = device.type == "cuda"
        name = torch.cuda.get_device_name(device) if cuda else "CPU allocator"
        tracked = summarise(self.tracker.events(), setting, "")
        return combined(tracked, self.totals, setting, f"measured: {name}")

    def _note_texts(self, module: nn.Module, inputs: tuple, options: dict) -> None:
        (batch, *_), again = inputs, options.get("known") is not None
        if not again:  # with gradient caching each batch once
            # The positions that the texts are padded to, and each text's valid tokens.
            mask = batch.token_mask
            self.texts.append((mask.shape[1], mask.sum(1).tolist()))  # CPU-GPU sync

    @contextmanager
    def _on_cuda(self) -> Iterator[None]:
        record_history(10**7)
        torch.cuda.reset_peak_memory_stats(self.train_engine.device)  # what came before is no step
        with self.tracker, self.tracker.attach_to_training(self.train_engine):
            yield
        self.totals.update(statistics(self.train_engine.device))

    @contextmanager
    def _on_cpu(self) -> Iterator[None]:
        tracker = self.tracker
        attached = tracker.attach_to_training(self.train_engine)
        with cpu_events.seen_by_the_profiler(), tracker, attached:
            before, known = sum(event.bytes for event in tracker.events()), len(tracker.blocks)
            with cpu_events.recording() as profiler:
                yield
        sizes = [size for name, size in cpu_events.events(profiler) if name == cpu_events.MEMORY]
        # The profiler has no events for batches that were allocated before it started or by a data
        # loading process. The tracker first sees such a batch when it claims it as "data", and so
        # records no operator for it.
        unseen = []
        for event in tracker.events():
            if event.category == "data" and not event.op and event.block >= known:
                unseen.append(event.bytes)
        peaks = max(accumulate(sizes, initial=before)), max(accumulate(unseen, initial=0))
        self.totals["requested"] = sum(peaks)


def _write(folder: Path, answer: predict_subprocess.PredictionAnswer, measured: Report) -> None:
    if measured.source != "measured: CPU allocator":
        torch.cuda.synchronize()  # CPU-GPU sync
        torch.cuda.memory._dump_snapshot(str(folder / SNAPSHOT))  # for pytorch.org/memory_viz
    content: JsonObject = {"prediction": answer.report, "measurement": measured.to_dict()}
    content["differences"] = None
    if answer.report is not None:
        content["differences"] = differences(answer.report, content["measurement"])
    else:
        content["prediction_failed"] = answer.failed
    try:
        (folder / FILE).write_text(json.dumps(content, indent=2) + "\n")
    except OSError as error:  # the training goes on
        say(f"warning: {folder / FILE} cannot be written: {error.strerror}")


def combined(tracked: Report, totals: dict[str, int], setting: JsonObject, source: str) -> Report:
    """A report of the tracker's categories, which add up to "requested", and the measured
    totals."""
    categories = dict(tracked.categories)
    categories["temporaries"] += totals["requested"] - tracked.totals["requested"]
    return Report(setting, source, categories, tracked.phases, totals)


def record_history(most: int = 100_000) -> None:
    """Keep the last `most` actions of CUDA's allocator from now on.

    No stacks: they cost time at every allocation.
    """
    torch.cuda.memory._record_memory_history(context=None, max_entries=most, clear_history=True)


def statistics(device: torch.device) -> dict[str, int]:
    """Peaks since they were last reset, in bytes; with "device" if the driver reports it.

    CPU-GPU sync.
    """
    torch.cuda.synchronize(device)
    stats = torch.cuda.memory_stats(device)
    names = ("requested", "allocated", "reserved")
    totals = {name: stats[f"{name}_bytes.all.peak"] for name in names}
    occupied = gpu_bytes(device)
    if occupied is not None:
        # The driver reports no peak: memory outside the allocator's segments is assumed to be the
        # same then as now.
        totals["device"] = occupied + totals["reserved"] - stats["reserved_bytes.all.current"]
    return totals


def gpu_bytes(device: torch.device) -> int | None:
    """The bytes that this process occupies on the GPU by NVML's count; None if it has none."""
    import pynvml

    try:
        pynvml.nvmlInit()
        uuid = torch.cuda.get_device_properties(device).uuid
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
        processes = pynvml.nvmlDeviceGetComputeRunningProcesses(handle)
        pynvml.nvmlShutdown()
    except pynvml.NVMLError:
        return None
    return own_bytes({process.pid: process.usedGpuMemory for process in processes}, os.getpid())


def own_bytes(used: dict[int, int | None], pid: int) -> int | None:
    """The entry of `used` for this process.

    In a container NVML may list another process id: a single entry is then taken to be this
    process's.
    """
    if pid in used:
        return used[pid]
    return next(iter(used.values())) if len(used) == 1 else None
