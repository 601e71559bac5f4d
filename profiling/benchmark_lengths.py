"""python profiling/benchmark_lengths.py [--preset ablation] [--json]

The trainer's step on batches of captions of like length (data.group_by_length) beside that on
batches as they come, in one process, in turn.

Both are whole windows of the same pairs of the preset's data, so the shares of short and long
batches are those of a run. Loading is timed apart, without loading processes; it has the lengths'
cost in it. B pairs, one rank.
"""

import sys
from pathlib import Path

if __name__ == "__main__":  # run by its path: not this folder, but the repository is searched first
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import statistics
from itertools import islice

from ds_cmli.common import quiet

quiet.silence()

import click

from ds_cmli import engine
from ds_cmli.common.cli import json_on_stdout, run_command
from ds_cmli.config.deepspeed_config import DeepSpeedConfig
from ds_cmli.config.options import WHAT, add, resolve_config
from ds_cmli.config.schema import Config
from ds_cmli.data.batch import Batch
from ds_cmli.data.load import build_data
from ds_cmli.data.loaders import train_loader
from ds_cmli.data.sampler import GlobalBatchSampler, LengthGroups
from ds_cmli.distributed import process_group as distributed
from profiling.benchmark_step import CLOCKS, STEPS, each_on, trainer
from profiling.scripts import compare

Figures = dict[str, dict[str, float]]


def padding(batches: list[Batch]) -> tuple[float, float]:
    """The mean length that texts are padded to, and the share of it that is padding."""
    lengths = [batch.attention_mask.shape[1] for batch in batches]
    filled = [batch.attention_mask.float().mean().item() for batch in batches]
    return statistics.mean(lengths), 1 - statistics.mean(filled)


@click.command(help=(__doc__ or "").split("\n\n")[1])
@add(*WHAT)
@click.option("--group", type=click.IntRange(2), default=50, show_default=True,
              help="The value of data.group_by_length: the batches of a window.")  # fmt: skip
@click.option("--windows", type=click.IntRange(1), default=1, show_default=True)
@click.option("--clock", type=click.Choice(tuple(CLOCKS)), default="wall", show_default=True,
              help="cpu: this process's time alone, for a CPU that others use too.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object alone.")
def command(preset, deepspeed_config, settings, group, windows, clock, as_json, **options) -> int:
    config = resolve_config(preset, settings, options)
    with json_on_stdout(as_json) as print_json:
        found = measured(config, deepspeed_config, (group, windows), clock)
        if as_json:
            print_json(found)
    return 0


def measured(config: Config, deepspeed_config: str, size: tuple[int, int], clock: str) -> Figures:
    """Print the table; the figures are those of `--json`."""
    group, windows = size
    device = distributed.init()
    ds_config = engine.on_this_device(DeepSpeedConfig.load(deepspeed_config))
    ds_config = engine.filled(config, ds_config, 1, STEPS)
    config, _ = engine.with_backend(config, ds_config, device)
    data = build_data(config.data, config.run.seed)
    batches: dict[str, list[Batch]] = {}
    found: Figures = {}
    for name, groups in (
        ("as they come", None),
        ("grouped", LengthGroups(group, data.text_length)),
    ):
        sampler = GlobalBatchSampler(
            data.mixture, ds_config.micro_batch, 0, 1, config.run.seed, groups
        )
        loader, started = iter(train_loader(data, sampler, 0)), CLOCKS[clock]()
        batches[name] = list(islice(loader, group * windows))
        found[name] = {"loading_s": (CLOCKS[clock]() - started) / (group * windows)}
        found[name] |= zip(("length", "padding"), padding(batches[name]), strict=True)
    click.echo(
        f"{config.run.preset}, {device.type}, {ds_config.precision}, {ds_config.micro_batch} pairs, "
        f"ZeRO-{ds_config.stage}; {windows} windows of {group} batches"
    )
    click.echo(f"{'':14}{'length':>8}{'padding':>9}{'loading':>9}{'step':>9}{'pairs/s':>9}{'ratio':>7}"
               "   (means; ms)")  # fmt: skip
    step = trainer(config, ds_config, data, device)
    for batch in batches["as they come"][:2]:  # optimizer states are made
        step(batch)
    runs = {name: each_on(step, each, device) for name, each in batches.items()}
    times = compare(runs, group * windows, CLOCKS[clock], warm_ups=0)
    for name, row in found.items():
        row["step_s"] = statistics.mean(times[name])
        row["pairs_per_s"] = ds_config.micro_batch / (row["step_s"] + row["loading_s"])
        row["ratio"] = row["pairs_per_s"] / found["as they come"]["pairs_per_s"]
        click.echo(
            f"{name:14}{row['length']:>8.1f}{row['padding']:>9.1%}{row['loading_s'] * 1e3:>9.1f}"
            f"{row['step_s'] * 1e3:>9.1f}{row['pairs_per_s']:>9.1f}{row['ratio']:>7.3f}"
        )
    distributed.shutdown()
    return found


if __name__ == "__main__":
    run_command(command)
