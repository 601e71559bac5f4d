"""python -m profiling.speed.data [--data ...] [--json]

How fast pairs come, compared with how fast pictures are decoded, and how long a training waits for them.

Two tables: pairs per second and loading process, against decoding the same pictures and nothing
else; the share of the trainer's steps spent waiting for the next batch. Of the demo, drawing a
scene counts as decoding.
"""

import time
from collections.abc import Callable, Iterator
from typing import Any

import click
import torch

from ds_cmli.common.cli import run_command
from ds_cmli.config.options import WHAT, add
from ds_cmli.data.batch import Batch
from ds_cmli.data.load import Data
from ds_cmli.data.pairs import TrainPairs
from ds_cmli.data.sampler import Draw
from profiling.scripts import prints_json, to_the_end
from profiling.speed.step import Training


def bare(data: Data, draws: list[Draw]) -> tuple[float, float]:
    """Pictures decoded in a second, and in a second of CPU time, by this process, and nothing
    else done.
    """
    pairs, started, used = data.train, time.perf_counter(), time.process_time()
    for draw in draws:
        if isinstance(pairs, TrainPairs):
            pairs.pictures.image(draw.sample)
        else:
            pairs[draw]
    return len(draws) / (time.perf_counter() - started), len(draws) / (time.process_time() - used)


def loaded(training: Training, workers: int, batches: int) -> tuple[float, float]:
    """Pairs in a second out of the loader, in its steady state, and in a second of this
    process's CPU time.
    """
    sampler = training.sampler()
    loader = training.loader(sampler, workers)
    for _ in range(2 + workers * training.config.data.prefetch):
        next(loader)  # those prepared while the processes started
    started, used = time.perf_counter(), time.process_time()
    for _ in range(batches):
        next(loader)
    pairs = batches * sampler.micro_batch
    return pairs / (time.perf_counter() - started), pairs / (time.process_time() - used)


def waiting(
    step: Callable[[Batch], None], loader: Iterator[Batch], steps: int
) -> tuple[float, float]:
    """Seconds of a step, and the share of it spent waiting for its batch, over `steps` after the
    first two.
    """
    taken, waited = 0.0, 0.0
    for number in range(-2, steps):
        started = time.perf_counter()
        batch = next(loader)
        ready = time.perf_counter()
        step(batch)
        if number >= 0:
            waited += ready - started
            taken += time.perf_counter() - started
    return taken / steps, waited / taken


@click.command(help=(__doc__ or "").split("\n\n")[1])
@add(*WHAT)
@click.option("--batches", type=click.IntRange(1), default=10, show_default=True,
              help="Measured of each loader.")  # fmt: skip
@click.option("--train-steps", type=click.IntRange(0), default=10, show_default=True,
              help="0: without the second table.")  # fmt: skip
@prints_json
def command(deepspeed_config, settings, batches, train_steps, **options) -> dict[str, Any]:
    with Training.of(deepspeed_config, settings, options) as training:
        return measured(training, batches, train_steps)


def measured(training: Training, batches: int, train_steps: int) -> dict[str, Any]:
    """Print the tables; the figures are those of `--json`."""
    config, data = training.config, training.data
    threads = torch.get_num_threads()
    figures: dict[str, Any] = {"image_size": config.data.image_size, "threads": threads}
    sampler = training.sampler()
    order = iter(sampler)
    by_wall, by_cpu = bare(data, [draw for _ in range(batches) for draw in next(order)])
    figures |= {"bare_per_s": by_wall, "bare_per_cpu_s": by_cpu}
    click.echo(f"pairs/s of {config.data.source}, and per second of CPU time")
    click.echo(f"  decoding alone      {by_wall:>8.0f} {by_cpu:>8.0f}")
    for workers in (0, 1, 2):
        rate, per_cpu = loaded(training, workers, batches)
        figures[f"loader_{workers}_per_s"] = rate
        line = f"  {workers} loading processes {rate:>8.0f}"
        if workers:
            click.echo(f"{line} {'':8} ({rate / workers / by_wall:.2f} of decoding alone, each)")
        else:
            figures["loader_0_per_cpu_s"] = per_cpu
            click.echo(f"{line} {per_cpu:>8.0f} ({per_cpu / by_cpu:.2f} of decoding alone)")

    if train_steps:
        step = to_the_end(training.step(), training.device)
        for workers in (0, 1):
            seconds, share = waiting(step, training.loader(sampler, workers), train_steps)
            figures |= {f"step_{workers}_s": seconds, f"waiting_{workers}": share}
            click.echo(
                f"  {workers} loading processes: a step takes {seconds:.3f} s, {share:.2%} of it waiting for its batch"
            )
    return figures


if __name__ == "__main__":
    run_command(command)
