"""`--dry-run`, from where a run would build its engine: its models, its first data, and its first steps without data.

Before that a dry run goes the run's own way, so both find the same mistakes. Nothing is trained and nothing is left.
"""

import json
from collections.abc import Iterator

import torch

from ds_cmli import engine as step
from ds_cmli.common.cli import say
from ds_cmli.common.errors import UserError
from ds_cmli.config.deepspeed_config import DeepSpeedConfig
from ds_cmli.config.schema import Config
from ds_cmli.data import Batch, train_loader
from ds_cmli.distributed import process_group as distributed
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


def rehearse(run: Run, ds_config: DeepSpeedConfig, vocab_size: int, device: torch.device) -> None:
    """Print the resolved configuration and the predicted memory. Collective.

    Args:
        run: with `NoEngine`, from where it would start or go on.
        ds_config: the DeepSpeed JSON with nothing left to "auto".

    Raises:
        UserError: on every rank, with why the run would fail within its first steps.
    """
    config = run.config
    say(json.dumps({"config": config.to_dict(), "deepspeed": ds_config.raw()}, indent=2))
    mistake = None
    with run.dog.slow():
        try:
            for line in _steps(config, ds_config, vocab_size, device) if distributed.is_main() else ():
                say(line)
            step.build_models(config, vocab_size)
        except UserError as error:
            mistake = str(error)
        distributed.raise_together(mistake)  # collective
    batches = iter(train_loader(run.data, run.sampler, config.data.workers))
    for _ in range(min(STEPS, run.total_steps - run.state.step)):
        run.train_step(batches)  # collectives
        if run.logs():
            run.stop_if_too_many_bad()  # collective


def _steps(config: Config, ds_config: DeepSpeedConfig, vocab_size: int, device: torch.device) -> Iterator[str]:
    """Try the first steps on tensors without data, as this device would take them, and show a GPU's memory.

    Raises:
        UserError: they fail.
    """
    targets = ["cuda"] if device.type == "cuda" else ["cpu", "cuda"]
    with apart.Predictor(SECONDS) as predictor:
        for target in targets:
            predictor.send(apart.Request(config, ds_config, distributed.world_size(), target))
        answers = [predictor.receive() for _ in targets]
    if answers[0].fails:
        raise UserError(answers[0].failed)
    if answers[0].report is None:
        yield f"the first steps were not tried: {answers[0].failed}"
    if answers[-1].report is not None:
        show(Report.from_dict(answers[-1].report))
    elif len(answers) > 1:
        yield f"no prediction for a GPU: {answers[-1].failed}"
