"""`--dry-run`: what is tried from the point where a run would build its engine.

The models are built, the memory of the first steps is predicted on tensors without data, and the
first data is loaded. Up to this point a dry run executes the same code as a run, so both find the
same mistakes. Nothing is trained, and nothing is left behind.
"""

import json
import os

import torch

from ds_cmli import engine
from ds_cmli.common.cli import say
from ds_cmli.common.errors import UserError
from ds_cmli.data.loaders import train_loader
from ds_cmli.distributed import process_group as distributed
from ds_cmli.faults import preemption
from ds_cmli.memory import out_of_memory, predict_subprocess
from ds_cmli.memory.inputs import UNCOMPILED
from ds_cmli.memory.report import Report, show
from ds_cmli.prepare import Prepared, next_batch

STEPS = 2  # optimizer steps whose data is loaded
SECONDS = 600  # limit for the predictions


def rehearse(ready: Prepared) -> int:
    """Print the resolved configuration and the predicted memory, and load the first data.

    Collective.

    Returns:
        The exit code.

    Raises:
        UserError: on every rank, with the reason why the run would fail within its first steps.
    """
    start, config = ready.start, ready.config
    shown = {
        "config": config.to_dict(),
        "deepspeed": ready.plan.deepspeed.raw(),
        "start": {
            "resume": start.resume,
            "profile": start.profiles.trace,
            "profile_memory": start.profiles.memory,
        },
    }
    say(json.dumps(shown, indent=2))
    if config.run.compile != "off":
        say(UNCOMPILED)
    mistake = None
    with ready.place.watchdog.slow():
        try:
            _try_models(ready)
        except UserError as error:
            mistake = str(error)
        distributed.raise_together(mistake)  # collective
    try:
        _load_first(ready)  # collectives
    except preemption.Preempted:
        return preemption.EXIT_CODE
    return 0


def _try_models(ready: Prepared) -> None:
    """Build the models on every rank, while rank 0 also has the memory of a step predicted."""
    config, deepspeed, data = ready.config, ready.plan.deepspeed, ready.data
    if not distributed.is_main():
        engine.build_models(config, data.vocab_size, special=data.special)
        return
    device, ranks = ready.place.device, distributed.world_size()
    targets = ["cuda"] if device.type == "cuda" else ["cpu", "cuda"]
    with predict_subprocess.Predictor(SECONDS) as predictor:
        for target in targets:
            predictor.send(predict_subprocess.Request(config, deepspeed, ranks, target, None))
        engine.build_models(config, data.vocab_size, special=data.special)
        _show([predictor.receive() for _ in targets], device)


def _load_first(ready: Prepared) -> None:
    """Load the data of the first steps. Collectives."""
    plan, done = ready.plan, ready.state.step
    workers = ready.config.data.workers
    batches = iter(train_loader(ready.data, plan.sampler, workers, preemption.shield))
    accumulation = plan.deepspeed.accumulation
    for taken in range(1, 1 + min(STEPS, plan.total_steps - done)):
        for _ in range(accumulation):
            ready.bad.add(next_batch(ready, batches).batch.bad)  # collective
        seen = (done + taken) * accumulation * plan.sampler.global_batch
        ready.bad.check(ready.flags, seen)  # collective


def _show(answers: list[predict_subprocess.PredictionAnswer], device: torch.device) -> None:
    """Print the memory that a GPU needs, and check that this device has enough.

    Args:
        answers: the prediction for this device and, if it is not a GPU, also the one for a GPU.

    Raises:
        UserError: the first steps would fail on this device.
    """
    own, of_gpu = answers[0], answers[-1]
    if own.fails:
        raise UserError(own.failed)
    if of_gpu.report is not None:
        show(Report(**of_gpu.report))
    if own.report is None:
        say(f"the first steps were not tried: {own.failed}")
        return
    if of_gpu.report is None:
        say(f"no prediction for a GPU: {of_gpu.failed}")
    room = out_of_memory.room_of(device, out_of_memory.process_bytes())
    needed = own.report["totals"]["allocated" if device.type == "cuda" else "requested"]
    most = room.bytes or os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > most:
        raise UserError(
            f"out of memory: a step needs {needed:,} B by prediction, "
            f"more than the {most:,} B {room.limit}: "
            "profiling/predict.py --fit names what fits"
        )
