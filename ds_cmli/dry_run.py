"""`--dry-run`, from where a run would build its engine: its models, its first data, and its first steps without data.

Before that a dry run goes the run's own way, so both find the same mistakes. Nothing is trained and nothing is left.
"""

import json
import os
from contextlib import nullcontext

import torch

from ds_cmli import engine as step
from ds_cmli.common.cli import say
from ds_cmli.common.errors import UserError
from ds_cmli.config.deepspeed_config import DeepSpeedConfig
from ds_cmli.config.schema import Config
from ds_cmli.data import Batch, train_loader
from ds_cmli.distributed import process_group as distributed
from ds_cmli.faults import out_of_memory as oom
from ds_cmli.faults import preemption
from ds_cmli.memory import apart
from ds_cmli.memory.report import Report, show
from ds_cmli.run import Run

STEPS = 2  # that are tried
SECONDS = 600  # for the steps without data


class NoEngine:
    """In the place of the engine, where only a run's data is tried."""

    skipped = False
    ignored = torch.zeros(())

    def __init__(self, config: Config):
        self.losses = config.loss.weights

    def __call__(self, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return torch.zeros(()), {name: torch.zeros(()) for name in self.losses}


def rehearse(
    run: Run, ds_config: DeepSpeedConfig, vocab_size: int, device: torch.device, start: dict[str, str | int | None]
) -> None:
    """Print the resolved configuration and the predicted memory. Collective.

    Args:
        run: with `NoEngine`, from where it would start or go on.
        ds_config: the DeepSpeed JSON with nothing left to "auto".
        start: options of this start that are no settings of the run, to be printed too.

    Raises:
        UserError: on every rank, with why the run would fail within its first steps.
    """
    config = run.config
    say(json.dumps({"config": config.to_dict(), "deepspeed": ds_config.raw(), "start": start}, indent=2))
    mistake = None
    with run.dog.slow(), apart.Predictor(SECONDS) if distributed.is_main() else nullcontext() as predictor:
        try:
            targets = ["cuda"] if device.type == "cuda" else ["cpu", "cuda"]
            if predictor is not None:
                for target in targets:
                    predictor.send(apart.Request(config, ds_config, distributed.world_size(), target))
            step.build_models(config, vocab_size)
            if predictor is not None:
                _show([predictor.receive() for _ in targets], device)
        except UserError as error:
            mistake = str(error)
        distributed.raise_together(mistake)  # collective
    loader = train_loader(run.data, run.sampler, config.data.workers)
    loader.worker_init_fn = preemption.shield
    batches = iter(loader)
    for _ in range(min(STEPS, run.total_steps - run.state.step)):
        run.train_step(batches)  # collectives
        if run.logs():
            run.stop_if_too_many_bad()  # collective


def _show(answers: list[apart.Answer], device: torch.device) -> None:
    """Show what memory a GPU needs.

    Args:
        answers: of the first steps without data as this device takes them and, where that is no GPU, as one would.

    Raises:
        UserError: this device cannot take them.
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
    room = oom.device_room(device) if gpu else oom.process_room(oom.process_bytes())
    needed = here.report["totals"]["allocated" if gpu else "requested"]
    most = room.bytes or os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > most:
        raise UserError(
            f"out of memory: a step needs {needed:,} B by prediction, more than the {most:,} B {room.limit}: "
            "profiling/predict.py --fit names what fits"
        )
