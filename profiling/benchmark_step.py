"""python profiling/benchmark_step.py [--json]

The trainer's step beside a plain PyTorch loop over the same models and the same batches, in one
process, interleaved.

The plain loop is what one writes without this project: fp32 weights, autocast to the trainer's
precision where that is 16 bit, a fused AdamW over the same parameter groups, clipping by the global
norm, `torch.utils.checkpoint` where activations are recomputed. Its frozen teacher is cast once, as
the trainer's is.

B pairs, of the preset's data; one rank.
"""

import sys
from pathlib import Path

if __name__ == "__main__":  # run by its path: not this folder, but the repository is searched first
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from itertools import cycle

from ds_cmli.common import quiet

quiet.silence()

import click
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ds_cmli import engine
from ds_cmli.common.cli import json_on_stdout, run_command
from ds_cmli.config.deepspeed_config import DeepSpeedConfig
from ds_cmli.config.options import WHAT, add, resolve_config
from ds_cmli.config.schema import Config
from ds_cmli.data.batch import Batch
from ds_cmli.data.load import Data, build_data
from ds_cmli.data.loaders import train_loader
from ds_cmli.data.sampler import GlobalBatchSampler
from ds_cmli.distributed import process_group as distributed
from ds_cmli.models.blocks import checkpoint_blocks
from profiling.scripts import compare

Step = Callable[[Batch], torch.Tensor]
STEPS = 1_000_000  # of the schedule: the rate stays near its start


def trainer(config: Config, ds_config: DeepSpeedConfig, data: Data, device: torch.device) -> Step:
    train_engine = engine.build(config, ds_config, data.vocab_size, STEPS, device)
    return lambda batch: train_engine(batch)[0]


def plain(config: Config, ds_config: DeepSpeedConfig, data: Data, device: torch.device) -> Step:
    dtype = engine.DTYPES[ds_config.precision]
    objective, teacher = engine.build_models(config, data.vocab_size)
    objective.to(device)
    if ds_config.checkpointing:
        checkpoint_blocks(objective.student.blocks, partial(checkpoint, use_reentrant=False))
    params = ds_config.optimizer_params
    groups = engine.parameter_groups(objective, params["weight_decay"], config.optim, params["lr"])
    optimizer = torch.optim.AdamW(
        groups, lr=params["lr"], betas=params["betas"], eps=params["eps"], fused=True
    )
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    if teacher is not None:
        teacher.to(device, dtype)

    def step(batch: Batch) -> torch.Tensor:
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
        return loss.detach()

    return step


CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def each_on(step: Step, batches: list[Batch], device: torch.device) -> Callable[[], None]:
    """The step on one batch after another, until the device has finished it."""
    turns = cycle(batches)

    def run() -> None:
        step(next(turns))
        if device.type == "cuda":
            torch.cuda.synchronize()

    return run


@click.command(help=(__doc__ or "").split("\n\n")[1])
@add(*WHAT)
@click.option("--repeats", type=click.IntRange(1), default=12, show_default=True)
@click.option("--clock", type=click.Choice(tuple(CLOCKS)), default="wall", show_default=True,
              help="cpu: this process's time alone, for a CPU that others use too.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object alone.")
def command(preset, deepspeed_config, settings, repeats, clock, as_json, **options) -> int:
    with json_on_stdout(as_json) as print_json:
        found = measured(
            resolve_config(preset, settings, options), deepspeed_config, repeats, clock
        )
        if as_json:
            print_json(found)
    return 0


def measured(
    config: Config, deepspeed_config: str, repeats: int, clock: str
) -> dict[str, float | str | int]:
    """Print the table; the figures are those of `--json`."""
    device = distributed.init()
    ds_config = engine.on_this_device(DeepSpeedConfig.load(deepspeed_config))
    ds_config = engine.filled(config, ds_config, 1, STEPS).replaced(activation_checkpointing=None)
    config, _ = engine.with_backend(config, ds_config, device)
    data = build_data(config.data, config.run.seed)
    pairs = len(data.train)  # type: ignore[arg-type]
    sampler = GlobalBatchSampler(pairs, ds_config.micro_batch, 0, 1, config.run.seed)
    loader = iter(train_loader(data, sampler, 0))
    batches = [next(loader) for _ in range(4)]
    for notice in ds_config.notices:
        click.echo(notice)
    click.echo(
        f"torch {torch.__version__}, {device.type}, {torch.get_num_threads()} threads, {ds_config.precision}, "
        f"{ds_config.micro_batch} pairs, ZeRO-{ds_config.stage}"
    )
    click.echo(
        f"{'':15}{'trainer':>12}{'plain loop':>12}{'ratio':>8}{'fastest':>9}   (medians, ms; activations)"
    )
    found: dict[str, float | str | int] = {
        "precision": ds_config.precision,
        "stage": ds_config.stage,
        "clock": clock,
    }
    for name, section in (("", None), ("_checkpointing", {})):
        own = ds_config.replaced(activation_checkpointing=section)
        steps = {build.__name__: build(config, own, data, device) for build in (trainer, plain)}
        runs = {key: each_on(step, batches, device) for key, step in steps.items()}
        # The first two warm up: optimizer states are made, and shapes seen.
        times = compare(runs, repeats, CLOCKS[clock], warm_ups=2)
        ours, theirs = (statistics.median(times[key]) for key in steps)
        ratio = statistics.median(a / b for a, b in zip(*times.values(), strict=True))
        fastest = min(times["trainer"]) / min(times["plain"])
        click.echo(
            f"{name.removeprefix('_') or 'stored':15}{ours * 1e3:>12.1f}{theirs * 1e3:>12.1f}"
            f"{ratio:>8.3f}{fastest:>9.3f}"
        )
        found |= {
            f"trainer_s{name}": ours,
            f"plain_s{name}": theirs,
            f"ratio{name}": round(ratio, 4),
        }
    distributed.shutdown()
    return found


if __name__ == "__main__":
    run_command(command)
