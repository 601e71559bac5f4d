"""python -m profiling.speed.lengths [--preset ablation] [--json]

The trainer's step on batches of captions of like length (data.group_by_length) compared with that on
batches as they come, in one process, in turn.

Both are whole windows of the same pairs of the preset's data, so the shares of short and long
batches are those of a run. Loading is timed apart, without loading processes; it has the lengths'
cost in it. B pairs, one rank.
"""

import statistics
from itertools import islice

import click

from ds_cmli.common.cli import run_command
from ds_cmli.config.options import WHAT, add
from ds_cmli.data.batch import Batch
from ds_cmli.data.sampler import LengthGroups
from profiling.scripts import CLOCKS, clock_option, compare, prints_json
from profiling.speed.step import Training

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
@clock_option
@prints_json
def command(deepspeed_config, settings, group, windows, clock, **options) -> Figures:
    with Training.of(deepspeed_config, settings, options) as training:
        return measured(training, group, windows, clock)


def measured(training: Training, group: int, windows: int, clock: str) -> Figures:
    """Print the table; the figures are those of `--json`."""
    ds_config, now = training.ds_config, CLOCKS[clock]
    batches: dict[str, list[Batch]] = {}
    figures: Figures = {}
    grouped = LengthGroups(group, training.data.text_length)
    for name, groups in (("as they come", None), ("grouped", grouped)):
        loader, started = training.loader(training.sampler(groups)), now()
        batches[name] = list(islice(loader, group * windows))
        figures[name] = {"loading_s": (now() - started) / (group * windows)}
        figures[name] |= zip(("length", "padding"), padding(batches[name]), strict=True)
    click.echo(
        f"{training.config.run.preset}, {training.device.type}, {ds_config.precision}, "
        f"{ds_config.micro_batch} pairs, ZeRO-{ds_config.stage}; {windows} windows of {group} batches"
    )
    columns = f"{'length':>8}{'padding':>9}{'loading':>9}{'step':>9}{'pairs/s':>9}{'ratio':>7}"
    click.echo(f"{'':14}{columns}   (means; ms)")
    step = training.step()
    for batch in batches["as they come"][:2]:  # optimizer states are made
        step(batch)
    runs = {name: training.each_on(step, own) for name, own in batches.items()}
    times = compare(runs, group * windows, now, warm_ups=0)
    for name, row in figures.items():
        row["step_s"] = statistics.mean(times[name])
        row["pairs_per_s"] = ds_config.micro_batch / (row["step_s"] + row["loading_s"])
        row["ratio"] = row["pairs_per_s"] / figures["as they come"]["pairs_per_s"]
        click.echo(
            f"{name:14}{row['length']:>8.1f}{row['padding']:>9.1%}{row['loading_s'] * 1e3:>9.1f}"
            f"{row['step_s'] * 1e3:>9.1f}{row['pairs_per_s']:>9.1f}{row['ratio']:>7.3f}"
        )
    return figures


if __name__ == "__main__":
    run_command(command)
