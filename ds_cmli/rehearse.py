"""`--dry-run`: what is tried from the point where a run would build its engine.

The models are built, the memory of the first steps is predicted on tensors without data, and the
first data is loaded. Up to this point a dry run executes the same code as a run, so both find the
same mistakes. Nothing is trained, and nothing is left behind.
"""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import torch

from ds_cmli import engine
from ds_cmli.common.cli import say
from ds_cmli.common.errors import UserError
from ds_cmli.config.deepspeed_config import DeepSpeedConfig
from ds_cmli.data.batch import Batch
from ds_cmli.data.loaders import train_loader
from ds_cmli.distributed import process_group as distributed
from ds_cmli.faults import preemption
from ds_cmli.memory import out_of_memory, predict_subprocess
from ds_cmli.memory.inputs import UNCOMPILED, likeliest
from ds_cmli.memory.report import Report, show

STEPS = 2  # optimizer steps whose data is loaded
SECONDS = 600  # limit for the predictions


def rehearse(
    run: Any,
    ds_config: DeepSpeedConfig,
    device: torch.device,
    start: dict[str, str | int | None],
    next_batch: Callable[[Iterator[Batch]], tuple[Batch, bool, bool]],
) -> int:
    """Print the resolved configuration and the predicted memory, and load the first data.

    Collective.

    Args:
        run: `train.Run` without an engine, in the state in which training would start or go on.
        ds_config: the DeepSpeed JSON, with no value left at "auto".
        start: options of this start that are not settings of the run; they are printed too.
        next_batch: the training loop's function that takes the next micro-batch, a collective.

    Returns:
        The exit code.

    Raises:
        UserError: on every rank, with the reason why the run would fail within its first steps.
    """
    config = run.config
    say(
        json.dumps(
            {"config": config.to_dict(), "deepspeed": ds_config.raw(), "start": start}, indent=2
        )
    )
    if config.run.compile != "off":
        say(UNCOMPILED)
    mistake = None
    with (
        run.watchdog.slow(),
        predict_subprocess.Predictor(SECONDS)
        if distributed.is_main()
        else nullcontext() as predictor,
    ):
        try:
            targets = ["cuda"] if device.type == "cuda" else ["cpu", "cuda"]
            if predictor is not None:
                ranks = distributed.world_size()
                rank = likeliest(ds_config.stage, ranks)
                for target in targets:
                    predictor.send(
                        predict_subprocess.Request(config, ds_config, ranks, target, rank)
                    )
            engine.build_models(config, run.data.vocab_size, special=run.data.special)
            if predictor is not None:
                _show([predictor.receive() for _ in targets], device)
        except UserError as error:
            mistake = str(error)
        distributed.raise_together(mistake)  # collective
    batches = iter(train_loader(run.data, run.sampler, config.data.workers, preemption.shield))
    try:
        for taken in range(1, 1 + min(STEPS, run.total_steps - run.state.step)):
            for _ in range(run.accumulation):
                batch, *_ = next_batch(batches)  # collective
                run.bad.add(batch.bad)
            seen = (run.state.step + taken) * run.accumulation * run.sampler.global_batch
            run.bad.check(run.flags, seen)  # collective
    except preemption.Preempted:
        return preemption.EXIT_CODE
    return 0


def _show(answers: list[predict_subprocess.Answer], device: torch.device) -> None:
    """Print the memory that a GPU needs, and check that this device has enough.

    Args:
        answers: the prediction for this device and, if it is not a GPU, also the one for a GPU.

    Raises:
        UserError: the first steps would fail on this device.
    """
    here, there = answers[0], answers[-1]
    if here.fails:
        raise UserError(here.failed)
    if there.report is not None:
        show(Report.from_dict(there.report))
    if here.report is None:
        say(f"the first steps were not tried: {here.failed}")
        return
    if there.report is None:
        say(f"no prediction for a GPU: {there.failed}")
    gpu = device.type == "cuda"
    room = (
        out_of_memory.device_room(device)
        if gpu
        else out_of_memory.process_room(out_of_memory.process_bytes())
    )
    needed = here.report["totals"]["allocated" if gpu else "requested"]
    most = room.bytes or os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > most:
        raise UserError(
            f"out of memory: a step needs {needed:,} B by prediction, "
            f"more than the {most:,} B {room.limit}: "
            "profiling/predict.py --fit names what fits"
        )
