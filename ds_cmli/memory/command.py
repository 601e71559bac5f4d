"""`ds-cmli-memory`, or `python profiling/predict.py`: predict the memory that a training needs,
before asking for GPUs.

It runs the real training step on tensors without data, which takes seconds, needs no GPU and
downloads nothing. It takes the options of train.py.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import click

from ds_cmli.common.cli import GroupedCommand, option, run_command
from ds_cmli.common.errors import UserError
from ds_cmli.config.deepspeed_config import DeepSpeedConfig
from ds_cmli.config.options import WHAT, add, resolve_config, tell_beside_json
from ds_cmli.config.schema import Config

# A prediction runs on the CPU even if there is a GPU. DeepSpeed chooses its device when it is
# imported.
os.environ.update(CUDA_VISIBLE_DEVICES="", DS_ACCELERATOR="cpu")

CPU = "cpu"


@click.command(cls=GroupedCommand, context_settings={"help_option_names": ["-h", "--help"]})
@add(*WHAT)
@option(
    "Prediction",
    "--world-size",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Ranks.",
)
@option(
    "Prediction",
    "--checkpointing",
    type=click.Choice(["on", "off"]),
    help="Of activations.  [the JSON's]",
)
@option("Prediction", "--gpu", "--card", "gpu", help="Whose context, workspace and NCCL buffers are added; cpu: "
        "predict a training on this machine's CPU.  [RTX 3090 24GB]")  # fmt: skip
@option(
    "Questions",
    "--sweep",
    multiple=True,
    metavar="AXES",
    help="A grid over batch, world or stage, by comma, each with or without values: batch=64,128,world,stage.",
)
@option(
    "Questions",
    "--fit",
    metavar="SIZE|GPU",
    help="The largest micro-batch that fits: 24GB (10^9 bytes), 22GiB, or a GPU's name.",
)
@option(
    "Files", "--json", "json_path", type=click.Path(dir_okay=False), help="The report, in bytes."
)
@option("Files", "--snapshot", type=click.Path(dir_okay=False), help="For pytorch.org/memory_viz.")  # fmt: skip
def command(preset: str, deepspeed_config: str, settings: tuple[str, ...], world_size: int, checkpointing: str | None,
            gpu: str | None, sweep: tuple[str, ...], fit: str | None, json_path: str | None, snapshot: str | None,
            **options: Any) -> None:  # fmt: skip
    """Predict the memory of a training step by category and phase, and on the device."""
    config = resolve_config(preset, settings, options)
    if sweep and (fit or snapshot):
        raise UserError(
            f"--sweep is {','.join(sweep)!r}: it goes with neither --fit nor --snapshot: give one of them"
        )
    if gpu == CPU and (sweep or fit or snapshot):
        raise UserError(
            "--gpu is 'cpu': --sweep, --fit and --snapshot are about GPUs: name one, or leave it out"
        )
    ds_config = DeepSpeedConfig.load(deepspeed_config)
    tell_beside_json(config, ds_config, world_size, settings, options)
    if checkpointing == "on":
        ds_config = ds_config.replaced(
            activation_checkpointing=ds_config.get("activation_checkpointing", {})
        )
    elif checkpointing == "off":
        ds_config = ds_config.replaced(activation_checkpointing=None)
    micro_batch = ds_config.batch(config.optim.micro_batch, world_size)[1]
    from ds_cmli.common import quiet

    quiet.silence()
    from ds_cmli.allocator import gpus
    from ds_cmli.memory import search
    from ds_cmli.memory.predict import DEFAULT_GPU
    from ds_cmli.memory.report import show

    if sweep:
        axes = search.parse_axes(sweep, micro_batch, world_size)
        content: Any = grid(config, ds_config, world_size, axes, gpu or DEFAULT_GPU)
    else:
        if fit:
            room, fitted_gpu = gpus.parse_memory(fit)
            gpu = gpu or fitted_gpu or DEFAULT_GPU
            fitted = search.fit(config, ds_config, world_size, room, gpu=gpu, tell=tell)
            prediction = fitted.prediction
        elif gpu == CPU:
            prediction = search.predict_largest(
                config, ds_config, world_size, target="cpu", tell=tell
            )
        else:
            prediction = search.predict_largest(
                config, ds_config, world_size, gpu=gpu or DEFAULT_GPU, tell=tell
            )
        tell("")
        if fit:
            print(fit_sentence(fitted, room))
            print(meant(fit, room, fitted_gpu or "", gpu or DEFAULT_GPU, world_size))
        elif gpu != CPU:
            print(sentence(prediction.report, gpu or DEFAULT_GPU))
        show(prediction.report)
        if fit:
            print_fit(fitted, room)
        content = prediction.report.to_dict()
        if snapshot:
            from ds_cmli.allocator import snapshot as snapshots

            write(snapshot, "--snapshot", lambda: snapshots.write(prediction.events, snapshot))
    if json_path:
        write(
            json_path,
            "--json",
            lambda: Path(json_path).write_text(json.dumps(content, indent=2) + "\n"),
        )


def grid(
    config: Config,
    ds_config: DeepSpeedConfig,
    world_size: int,
    axes: dict[str, list[int]],
    gpu: str,
) -> list:
    """Print the bytes on the device as they are found, then as a table: the first axis in rows, the
    others in columns.

    Returns the points' reports as dictionaries.
    """
    from itertools import product

    from rich.console import Console
    from rich.table import Table

    from ds_cmli.allocator import gpus
    from ds_cmli.memory import search
    from ds_cmli.memory.report import gigabytes

    reports, device = [], {}
    total = gpus.find(gpu).total.bytes
    for point, prediction in search.sweep(config, ds_config, world_size, axes, gpu=gpu, tell=tell):
        tell("")
        device[point] = prediction.report.totals["device"]
        reports.append(prediction.report.to_dict())
        names = ", ".join(f"{name} {value}" for name, value in zip(axes, point, strict=True))
        print(f"{names}: {device[point]:,} B on the device", flush=True)
    (first, rows), *others = axes.items()
    axes_across = [values for _, values in others]
    digits = max(len(gigabytes(total, size)[0].partition(".")[2]) for size in device.values())
    title = f"GB on the device; {gpu} has {total / 1e9:.{digits}f}, * does not fit"
    table = Table(title=title, title_justify="left")
    table.add_column(first, justify="right")
    for values in product(*axes_across):
        heads = (f"{name} {value}" for (name, _), value in zip(others, values, strict=True))
        table.add_column(", ".join(heads) or "GB", justify="right")
    for row in rows:
        sizes = [device[point] for point in product([row], *axes_across)]
        table.add_row(
            str(row), *(f"{size / 1e9:.{digits}f}{'*' if size > total else ' '}" for size in sizes)
        )
    Console(highlight=False).print(table)
    return reports


def sentence(report: Any, gpu: str) -> str:
    """The answer in one sentence: whether the step fits on `gpu`."""
    from ds_cmli.allocator import gpus
    from ds_cmli.memory.report import gigabytes

    total = gpus.find(gpu).total.bytes
    needed, has = gigabytes(report.totals["device"], total)
    (difference,) = gigabytes(
        abs(report.totals["device"] - total), digits=len(has.partition(".")[2])
    )
    setting = report.setting
    step = f"micro-batch {setting['micro_batch']} with ZeRO-{setting['zero_stage']} over {setting['world_size']} GPUs"
    step += f" (rank {setting['rank']}, which needs the most)" if setting.get("rank") else ""
    if report.totals["device"] > total:
        what = f"does not fit on a {gpu} ({has} GB), by {difference} GB"
        return f"{step} needs {needed} GB and {what}: --fit {gpu!r} finds what does"
    return f"{step} needs {needed} GB and fits on a {gpu} ({has} GB), {difference} GB are left"


def fit_sentence(fitted: Any, room: int) -> str:
    """The answer in one sentence: what fits, what one more pair needs, and which change makes
    the asked batch fit.
    """
    from ds_cmli.memory.report import gigabytes

    more = fitted.tried.get(max(fitted.micro_batch + 1, 1))
    what, changed = fitted.changes[0] if fitted.changes else ("", room)
    size, one_more, with_change = gigabytes(room, more or room, changed)
    if not fitted.micro_batch:
        out = f"does not fit in {size} GB: one pair needs {one_more} GB"
    else:
        out = f"fits in {size} GB with micro-batch {fitted.micro_batch}"
        if more is not None:
            out += f"; {fitted.micro_batch + 1} needs {one_more} GB"
    if what:
        out += f"; {fitted.asked} would fit with {what}: {with_change} GB"
    elif fitted.asked > fitted.micro_batch:
        out += f"; nothing that was tried makes {fitted.asked} fit"
    return out


def meant(fit: str, room: int, fitted_gpu: str, gpu: str, world_size: int) -> str:
    """What --fit was taken for, and how much of it tensors can have: the bytes of a size, or the
    memory of a GPU.
    """
    from ds_cmli.allocator import gpus

    usable = room - gpus.device_bytes(0, gpu, world_size)
    rest = "CUDA's context and NCCL" if world_size > 1 else "CUDA's context"
    left = f"{max(usable, 0):,} B of them for tensors, the rest is {rest} as on a {gpu}"
    if fitted_gpu:
        return f"--fit {fit!r} means the {room:,} B that a {fitted_gpu} has: {left}"
    others = [
        other
        for other in gpus.all_gpus().values()
        if room in other.nominal and other.total.bytes != room
    ]
    named = ", ".join(f"{other.name} ({other.total.bytes:,} B)" for other in others)
    hint = f"; to mean a GPU's own memory, name it: {named}" if named else ""
    return f"--fit {fit!r} means {room:,} B of a GPU: {left}{hint}"


def print_fit(fitted: Any, room: int) -> None:
    from ds_cmli.memory.report import gigabytes

    sizes = gigabytes(*fitted.tried.values())
    tried = ", ".join(f"{n}: {size} GB" for n, size in zip(fitted.tried, sizes, strict=True))
    print(f"tried, micro-batch: on the device: {tried}")
    if fitted.micro_batch:
        size = fitted.tried[fitted.micro_batch]
        print(
            f"the largest micro-batch that fits in {room:,} B: {fitted.micro_batch}, with {size:,} B on the device"
        )
    else:
        print(
            f"not even one pair per rank fits in {room:,} B: it takes {fitted.tried[1]:,} B on the device"
        )
    for what, size in fitted.changes:
        print(f"micro-batch {fitted.asked} fits with {what}: {size:,} B")
    if not fitted.changes and not fitted.micro_batch:
        print("no setting that was tried makes it fit: a smaller model, more ranks or a larger GPU")


def tell(line: str) -> None:
    """Show progress on stderr: on a terminal in one line that changes, elsewhere in a line each."""
    if sys.stderr.isatty():
        print(f"\r\033[K{line}", end="", file=sys.stderr, flush=True)
    elif line:
        print(line, file=sys.stderr, flush=True)


def write(path: str, setting: str, function: Any) -> None:
    try:
        function()
    except OSError as error:
        raise UserError(f"{setting} is {path!r}: cannot write there: {error.strerror}") from None


def main() -> None:
    run_command(command)
