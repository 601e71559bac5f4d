"""python -m profiling.speed.step

The trainer's step and a plain PyTorch loop's, over the same models and batches, in turn.

The plain loop is what one writes without this project: fp32 weights, autocast to the trainer's
precision where that is 16 bit, a fused AdamW over the same parameter groups, clipping by the global
norm. Its frozen teacher is cast once, as the trainer's is.
"""

import statistics
from collections.abc import Callable
from contextlib import nullcontext
from itertools import cycle

from ds_cmli.libraries import silence

silence()

import click
import torch
from torch import nn

from ds_cmli import engine
from ds_cmli.commands import run_command
from ds_cmli.config.deepspeed_config import DeepSpeedConfig
from ds_cmli.config.options import ConfigCommand
from ds_cmli.config.presets import load_preset
from ds_cmli.config.schema import Config
from ds_cmli.data.build import Data, build_data
from ds_cmli.data.pairs import Batch, loader
from ds_cmli.data.sampler import GlobalBatchSampler
from ds_cmli.distributed import process_group as distributed
from profiling.speed.op import CLOCKS, in_turn, seconds

STEPS = 1_000_000  # of the schedule: the rate stays near its start


def plain(
    config: Config, ds_config: DeepSpeedConfig, data: Data, device: torch.device
) -> Callable[[Batch], None]:
    dtype = engine.DTYPES[ds_config.precision]
    objective, teacher = engine.build_models(config, data.vocab_size)
    objective.to(device)
    params = ds_config["optimizer"]["params"]
    groups = engine.group_parameters(objective, params["weight_decay"], config.optim, params["lr"])
    adam = {name: params[name] for name in ("lr", "betas", "eps")}
    optimizer = torch.optim.AdamW(groups, **adam, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    if teacher is not None:
        teacher.to(device, dtype)

    def step(batch: Batch) -> None:
        batch = batch.to(device)
        targets = teacher(batch.image) if teacher is not None else None
        with nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype):
            loss, _ = objective(batch, targets)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(objective.parameters(), ds_config["gradient_clipping"])
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    return step


@click.command(cls=ConfigCommand, help=(__doc__ or "").split("\n\n")[1])
@click.option("--repeats", type=click.IntRange(1), default=12, show_default=True)
@click.option("--clock", type=click.Choice(tuple(CLOCKS)), default="wall", show_default=True)
def command(deepspeed_config, settings, repeats, clock, **options) -> None:
    config = load_preset(None, settings)
    device = distributed.init()
    ds_config = engine.adapt_to_device(DeepSpeedConfig.load(deepspeed_config))
    ds_config = ds_config.filled(config, 1, STEPS)
    config = engine.resolve_backend(config, ds_config, device)
    data = build_data(config.data, config.run.seed)
    micro_batch = ds_config["train_micro_batch_size_per_gpu"]
    sampler = GlobalBatchSampler(data.order, micro_batch, 0, 1, config.run.seed)
    loaded = iter(loader(data.train, data.collate, 0, batch_sampler=sampler))
    batches = [next(loaded) for _ in range(4)]
    trainer = engine.build(config, ds_config, data.vocab_size, STEPS, device, data.pad_id)
    steps: dict[str, Callable[[Batch], object]] = {
        "trainer": lambda batch: trainer.step([batch]),
        "plain": plain(config, ds_config, data, device),
    }

    def run(step: Callable[[Batch], object]) -> Callable[[], float]:
        turns = cycle(batches)
        return lambda: seconds(lambda: step(next(turns)), clock, device)

    runs = {name: run(step) for name, step in steps.items()}
    in_turn(runs, 2)  # they warm up: optimizer states are made, and shapes seen
    times = in_turn(runs, repeats)
    trainer_ms, plain_ms = (statistics.median(times[name]) * 1e3 for name in steps)
    ratio = statistics.median(a / b for a, b in zip(*times.values(), strict=True))
    print(
        f"{device.type}, {torch.get_num_threads()} threads, {ds_config.precision}, "
        f"{micro_batch} pairs, ZeRO-{ds_config.stage}: "
        f"trainer {trainer_ms:.1f} ms, plain loop {plain_ms:.1f} ms, ratio {ratio:.3f} (medians)"
    )
    distributed.shutdown()


if __name__ == "__main__":
    run_command(command)
