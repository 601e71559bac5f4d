"""Measured memory beside predicted memory: of a setting, or of the first steps of a training (`--profile-memory`)."""

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch

from ds_cmli.config.deepspeed_config import DeepSpeedConfig
from ds_cmli.config.schema import Config
from ds_cmli.data import Batch
from ds_cmli.distributed import process_group as distributed
from ds_cmli.engine import TrainEngine
from ds_cmli.memory import cpu_events, gpus, measure_cpu, measure_cuda, predict_subprocess
from ds_cmli.memory.collectives import seen_by_the_profiler
from ds_cmli.memory.report import Report, summarise
from ds_cmli.memory.tracker import Tracker

PREDICTION_S = 600  # seconds that the ranks wait for the prediction
FILE, SNAPSHOT = "memory.json", "memory-snapshot.pickle"


def measure(config: Config, ds_config: DeepSpeedConfig, world_size: int = 1, device: str = "cuda") -> Report:
    """Memory of rank 0 of `world_size`, with real tensors on one device, "cuda" or "cpu". Arguments as of `predict`.

    One GPU stands for many: the other ranks are imagined, by a process group that moves nothing.
    """
    return (measure_cuda if device == "cuda" else measure_cpu).measure(config, ds_config, world_size)


def differences(predicted: dict[str, Any], measured: dict[str, Any]) -> dict[str, dict[str, dict[str, float]]]:
    """Predicted less measured bytes, of every figure that both reports (`Report.to_dict`) have, and their ratio."""
    out: dict[str, dict[str, dict[str, float]]] = {}
    for part in ("totals", "phases", "categories"):
        out[part] = {}
        for name in predicted[part]:
            if name in measured[part]:
                ours, theirs = predicted[part][name], measured[part][name]
                out[part][name] = {"bytes": ours - theirs, **({"ratio": ours / theirs} if theirs else {})}
    return out


@contextmanager
def profiling_memory(
    steps: int | None, train_engine: TrainEngine, config: Config, ds_config: DeepSpeedConfig, folder: Path
) -> Iterator[Callable[[], None]]:
    """Measure the first `steps` optimizer steps of the training loop inside; call what this yields after each step.

    After the last of them rank 0 writes `folder/memory.json`: prediction, measurement and their differences; on CUDA
    also the allocator's history, for pytorch.org/memory_viz. The prediction, for which all ranks wait, is made by a
    process of its own and for texts as long as those that were measured. Collective.

    Args:
        steps: None: nothing is measured. With 1 the optimizer's states are not yet there when the peak is.
        ds_config: as `step.build` took it.
    """
    if steps is None:
        yield lambda: None
        return
    main = distributed.is_main()
    target = train_engine.device.type
    gpu = gpus.listed_name(torch.cuda.get_device_name(train_engine.device)) if target == "cuda" else ""
    texts: list[tuple[int, list[int]]] = []  # of this rank's micro-batches
    done = 0
    with ExitStack() as measuring:

        def seen(module: Any, inputs: tuple, keywords: dict[str, Any]) -> None:
            if keywords.get("part") not in ("compare", "replay"):  # which see no micro-batch for the first time
                texts.append(_lengths(inputs[0]))

        hook = train_engine.objective.register_forward_pre_hook(seen, with_kwargs=True)
        measuring.callback(hook.remove)
        report = measuring.enter_context(_measuring(train_engine, {"preset": config.run.preset, "steps": steps}))

        def after_step() -> None:
            nonlocal done
            done += 1
            if done == steps:
                measuring.close()
                every = list(zip(*distributed.gather_objects(texts), strict=True))  # collective
                if main:
                    request = predict_subprocess.Request(
                        config, ds_config, distributed.world_size(), target, gpu, every
                    )
                    with predict_subprocess.Predictor(PREDICTION_S) as predictor:
                        _write(folder, predictor.ask(request), report())
                if target == "cuda":
                    measure_cuda.record_history()  # back to the short history that every training keeps

        yield after_step


def _lengths(batch: Batch) -> tuple[int, list[int]]:
    """Positions that its texts are padded to, and valid tokens of each. CPU-GPU sync."""
    return batch.token_mask.shape[1], batch.token_mask.sum(1).tolist()


@contextmanager
def _measuring(train_engine: TrainEngine, setting: dict[str, Any]) -> Iterator[Callable[[], Report]]:
    """Measure the steps inside; what this yields returns the report, afterwards."""
    setting = {**setting, "world_size": distributed.world_size()}
    cuda = train_engine.device.type == "cuda"
    tracker = Tracker(train_engine.device.type)
    totals: dict[str, int] = {}

    def report() -> Report:
        tracked = summarise(tracker.events(host=not cuda), setting, "")
        source = f"measured: {torch.cuda.get_device_name(train_engine.device) if cuda else 'CPU allocator'}"
        return measure_cuda.combined(tracked, totals, setting, source)

    if cuda:
        measure_cuda.record_history(10**7)
        with tracker, tracker.attach_to_training(train_engine):
            yield report
        totals.update(measure_cuda.statistics(train_engine.device))
        return
    with seen_by_the_profiler(), tracker, tracker.attach_to_training(train_engine):
        before, known = sum(event.bytes for event in tracker.events()), len(tracker.ops)
        with cpu_events.recording() as profiler:
            yield report
    sizes = [size for name, size in cpu_events.events(profiler) if name == cpu_events.MEMORY]
    # Batches made before the profiler began, or by a loading process, are not among its events: the tracker first meets
    # them as "data", and no operator has made them.
    unseen = [e.bytes for e in tracker.events() if e.category == "data" and not e.op and e.block >= known]
    totals["requested"] = max(accumulate(sizes, initial=before))
    totals["requested"] += max(accumulate(unseen, initial=0))


def _write(folder: Path, answer: predict_subprocess.Answer, measured: Report) -> None:
    if measured.source != "measured: CPU allocator":
        measure_cuda.save_snapshot(folder / SNAPSHOT)
    content: dict[str, Any] = {"prediction": answer.report, "measurement": measured.to_dict(), "differences": None}
    if answer.report is not None:
        content["differences"] = differences(answer.report, content["measurement"])
    else:
        content["prediction_failed"] = answer.failed
    (folder / FILE).write_text(json.dumps(content, indent=2) + "\n")
