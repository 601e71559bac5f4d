"""Compares measured and predicted memory of a run's first steps (`--profile-memory`)."""

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch

from ds_cmli.allocator import gpus
from ds_cmli.common.cli import say
from ds_cmli.config.deepspeed_config import DeepSpeedConfig
from ds_cmli.config.schema import Config
from ds_cmli.data.batch import Batch
from ds_cmli.distributed import process_group as distributed
from ds_cmli.engine import TrainEngine
from ds_cmli.losses.objective import Embed, Request, Whole
from ds_cmli.memory import cpu_events, measure_cuda, predict_subprocess
from ds_cmli.memory.report import Report, summarise
from ds_cmli.memory.tracker import Tracker

PREDICTION_S = 600  # the most seconds that the ranks wait for the prediction
FILE, SNAPSHOT = "memory.json", "memory-snapshot.pickle"


def differences(
    predicted: dict[str, Any], measured: dict[str, Any]
) -> dict[str, dict[str, dict[str, float]]]:
    """Predicted minus measured bytes and their ratio, for every figure that both reports
    (`Report.to_dict`) have.
    """
    out: dict[str, dict[str, dict[str, float]]] = {}
    for part in ("totals", "phases", "categories"):
        out[part] = {}
        for name in predicted[part]:
            if name in measured[part]:
                ours, theirs = predicted[part][name], measured[part][name]
                out[part][name] = {
                    "bytes": ours - theirs,
                    **({"ratio": ours / theirs} if theirs else {}),
                }
    return out


@contextmanager
def profiling_memory(
    steps: int | None,
    train_engine: TrainEngine,
    config: Config,
    ds_config: DeepSpeedConfig,
    folder: Path,
) -> Iterator[Callable[[], None]]:
    """Measure the first `steps` optimizer steps of the training loop inside; call the yielded
    function after each step.

    After the last of these steps rank 0 writes `folder/memory.json`: prediction, measurement and
    their differences; on CUDA also the allocator's history, for pytorch.org/memory_viz. The
    prediction is made in a separate process, for texts of the lengths that were measured, while all
    ranks wait. Collective.

    Args:
        steps: None: nothing is measured. With 1, the optimizer's states do not exist yet at the
            peak.
        ds_config: as `engine.build` took it.
    """
    if steps is None:
        yield lambda: None
        return
    main = distributed.is_main()
    target = train_engine.device.type
    gpu = (
        gpus.listed_name(torch.cuda.get_device_name(train_engine.device))
        if target == "cuda"
        else ""
    )
    texts: list[tuple[int, list[int]]] = []  # text lengths of this rank's micro-batches
    done = 0
    with ExitStack() as measuring:

        def seen(module: Any, inputs: tuple[Request]) -> None:
            request = inputs[0]
            if isinstance(request, Whole | Embed):  # with gradient caching each batch counts once
                texts.append(_lengths(request.batch))

        hook = train_engine.objective.register_forward_pre_hook(seen)
        measuring.callback(hook.remove)
        report = measuring.enter_context(
            _measuring(train_engine, {"preset": config.run.preset, "steps": steps})
        )

        def after_step() -> None:
            nonlocal done
            done += 1
            if done == steps:
                measuring.close()
                every = list(zip(*distributed.gather_objects(texts), strict=True))  # collective
                if main:
                    ranks = distributed.world_size()
                    request = predict_subprocess.Request(
                        config, ds_config, ranks, target, gpu=gpu, texts=every
                    )
                    with predict_subprocess.Predictor(PREDICTION_S) as predictor:
                        _write(folder, predictor.ask(request), report())
                if target == "cuda":
                    # Back to the short history that every training run keeps.
                    measure_cuda.record_history()

        yield after_step


def _lengths(batch: Batch) -> tuple[int, list[int]]:
    """The number of positions that the batch's texts are padded to, and of each text's valid
    tokens. CPU-GPU sync.
    """
    return batch.token_mask.shape[1], batch.token_mask.sum(1).tolist()


@contextmanager
def _measuring(
    train_engine: TrainEngine, setting: dict[str, Any]
) -> Iterator[Callable[[], Report]]:
    """Measure the steps inside; once they have ended, the yielded function returns the report."""
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
    with cpu_events.seen_by_the_profiler(), tracker, tracker.attach_to_training(train_engine):
        before, known = sum(event.bytes for event in tracker.events()), len(tracker.ops)
        with cpu_events.recording() as profiler:
            yield report
    sizes = [size for name, size in cpu_events.events(profiler) if name == cpu_events.MEMORY]
    # The profiler has no events for batches that were allocated before it started or by a data
    # loading process. The tracker first sees such a batch when it claims it as "data", and so
    # records no operator for it.
    unseen = [
        e.bytes for e in tracker.events() if e.category == "data" and not e.op and e.block >= known
    ]
    totals["requested"] = max(accumulate(sizes, initial=before))
    totals["requested"] += max(accumulate(unseen, initial=0))


def _write(folder: Path, answer: predict_subprocess.Answer, measured: Report) -> None:
    if measured.source != "measured: CPU allocator":
        measure_cuda.save_snapshot(folder / SNAPSHOT)
    content: dict[str, Any] = {
        "prediction": answer.report,
        "measurement": measured.to_dict(),
        "differences": None,
    }
    if answer.report is not None:
        content["differences"] = differences(answer.report, content["measurement"])
    else:
        content["prediction_failed"] = answer.failed
    try:
        (folder / FILE).write_text(json.dumps(content, indent=2) + "\n")
    except OSError as error:  # the training goes on
        say(f"warning: {folder / FILE} cannot be written: {error.strerror}")
