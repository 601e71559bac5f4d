"""python -m profiling.speed.step [--json]

The trainer's step and a plain PyTorch loop over the same models and the same batches, in one
process, interleaved.

The plain loop is what one writes without this project: fp32 weights, autocast to the trainer's
precision where that is 16 bit, a fused AdamW over the same parameter groups, clipping by the global
norm, `torch.utils.checkpoint` where activations are recomputed. Its frozen teacher is cast once, as
the trainer's is.

B pairs, of the preset's data; one rank.
"""

import statistics
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import cycle

from ds_cmli.common import quiet

quiet.silence()

import click
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ds_cmli import engine
from ds_cmli.common.cli import run_command
from ds_cmli.config.deepspeed_config import DeepSpeedConfig
from ds_cmli.config.options import WHAT, add, resolve_config
from ds_cmli.config.schema import Config
from ds_cmli.data.batch import Batch
from ds_cmli.data.load import Data, build_data
from ds_cmli.data.loaders import train_loader
from ds_cmli.data.sampler import GlobalBatchSampler
from ds_cmli.distributed import process_group as distributed
from ds_cmli.models.blocks import checkpoint_blocks
from profiling.scripts import CLOCKS, clock_option, compare, prints_json, to_the_end

STEPS = 1_000_000  # of the schedule: the rate stays near its start
Step = Callable[[Batch], object]


@dataclass
class Training:
    """What a trainer's steps on one rank are made of."""

    config: Config
    ds_config: DeepSpeedConfig
    data: Data
    device: torch.device

    @classmethod
    @contextmanager
    def of(cls, deepspeed_config: str, settings: tuple, options: dict) -> "Iterator[Training]":
        """That of a command's options; a process group is there meanwhile."""
        config = resolve_config(settings, options)
        device = distributed.init()
        ds_config = engine.on_this_device(DeepSpeedConfig.load(deepspeed_config))
        ds_config = engine.filled(config, ds_config, 1, STEPS)
        config, _ = engine.with_backend(config, ds_config, device)
        yield cls(config, ds_config, build_data(config.data, config.run.seed), device)
        distributed.shutdown()

    def sampler(self) -> GlobalBatchSampler:
        pairs, seed = self.data.mixture, self.config.run.seed
        return GlobalBatchSampler(pairs, self.ds_config.micro_batch, 0, 1, seed)

    def loader(self, sampler: GlobalBatchSampler, workers: int = 0) -> Iterator[Batch]:
        prefetch = self.config.data.prefetch
        return iter(train_loader(self.data, sampler, workers, prefetch=prefetch))

    def step(self) -> Step:
        """The trainer's."""
        data = self.data
        return engine.build(
            self.config, self.ds_config, data.vocab_size, STEPS, self.device, data.special
        )

    def each_on(self, step: Step, batches: Iterable[Batch]) -> Callable[[], None]:
        """The step on one batch after another, until the device has finished it."""
        run, turns = to_the_end(step, self.device), cycle(batches)
        return lambda: run(next(turns))


def plain(training: Training) -> Step:
    ds_config, device = training.ds_config, training.device
    dtype = engine.DTYPES[ds_config.precision]
    objective, teacher = engine.build_models(training.config, training.data.vocab_size)
    objective.to(device)
    if ds_config.checkpointing:
        checkpoint_blocks(objective.student.blocks, partial(checkpoint, use_reentrant=False))
    params = ds_config.optimizer_params
    rates = (params["weight_decay"], training.config.optim, params["lr"])
    groups = engine.parameter_groups(objective, *rates)
    adam = {name: params[name] for name in ("lr", "betas", "eps")}
    optimizer = torch.optim.AdamW(groups, **adam, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    if teacher is not None:
        teacher.to(device, dtype)

    def step(batch: Batch) -> None:
        batch = batch.to(device)
        targets = teacher(batch.image) if teacher is not None else None
        with nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype):
            loss, _ = objective.whole(batch, targets)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(objective.parameters(), ds_config["gradient_clipping"])
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    return step


@click.command(help=(__doc__ or "").split("\n\n")[1])
@add(*WHAT)
@click.option("--repeats", type=click.IntRange(1), default=12, show_default=True)
@clock_option
@prints_json
def command(deepspeed_config, settings, repeats, clock, **options) -> dict[str, float | str | int]:
    with Training.of(deepspeed_config, settings, options) as training:
        return measured(training, repeats, clock)


def measured(training: Training, repeats: int, clock: str) -> dict[str, float | str | int]:
    """Print the table; the figures are those of `--json`."""
    ds_config = training.ds_config
    loader = training.loader(training.sampler())
    batches = [next(loader) for _ in range(4)]
    for notice in ds_config.notices:
        click.echo(notice)
    click.echo(
        f"torch {torch.__version__}, {training.device.type}, {torch.get_num_threads()} threads, "
        f"{ds_config.precision}, {ds_config.micro_batch} pairs, ZeRO-{ds_config.stage}"
    )
    columns = f"{'trainer':>12}{'plain loop':>12}{'ratio':>8}{'fastest':>9}"
    click.echo(f"{'':15}{columns}   (medians, ms; activations)")
    figures: dict[str, float | str | int] = {
        "precision": ds_config.precision,
        "stage": ds_config.stage,
        "clock": clock,
    }
    for name, section in (("", None), ("_checkpointing", {})):
        training.ds_config = ds_config.replaced(activation_checkpointing=section)
        steps = {"trainer": training.step(), "plain": plain(training)}
        runs = {key: training.each_on(step, batches) for key, step in steps.items()}
        # The first two warm up: optimizer states are made, and shapes seen.
        times = compare(runs, repeats, CLOCKS[clock], warm_ups=2)
        ours, theirs = (statistics.median(times[key]) for key in steps)
        ratio = statistics.median(a / b for a, b in zip(*times.values(), strict=True))
        fastest = min(times["trainer"]) / min(times["plain"])
        row = f"{ours * 1e3:>12.1f}{theirs * 1e3:>12.1f}{ratio:>8.3f}{fastest:>9.3f}"
        click.echo(f"{name.removeprefix('_') or 'stored':15}{row}")
        figures |= {f"trainer_s{name}": ours, f"plain_s{name}": theirs}
        figures[f"ratio{name}"] = round(ratio, 4)
    return figures


if __name__ == "__main__":
    run_command(command)
