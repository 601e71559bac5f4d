"""Predict the memory that a training needs: `ds-cmli-memory`, or `python profiling/predict.py`.

It runs the real training step on tensors without data, which takes seconds, needs no GPU and
downloads nothing. It takes the options of train.py.
"""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import click

from ds_cmli.commands import run_command
from ds_cmli.config.deepspeed_config import DeepSpeedConfig
from ds_cmli.config.options import ConfigCommand
from ds_cmli.config.presets import load_preset
from ds_cmli.config.schema import Config, Sections
from ds_cmli.errors import UserError, blame
from ds_cmli.files import JsonObject, check_writable
from ds_cmli.libraries import silence
from ds_cmli.memory.report import Report, by_retries, gigabytes, plot, show
from ds_cmli.memory_model import gpus
from ds_cmli.memory_model.gpus import Gpu

if TYPE_CHECKING:
    from ds_cmli.memory.fit import Fit

# A prediction leaves a GPU of this machine alone.
os.environ["CUDA_VISIBLE_DEVICES"] = ""
UNCOMPILED = "run.compile: predicted without, as what a compiler keeps shows only when it has run"


@click.command(cls=ConfigCommand, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--world-size",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Number of ranks.",
)
@click.option(
    "--checkpointing",
    type=click.Choice(["on", "off"]),
    help="Activation checkpointing.  [the JSON's]",
)
@click.option(
    "--gpu",
    help="GPU that is predicted, as nvidia-smi names it.  [the one here, or RTX 3090 24GB]",
)
@click.option("--gpu-memory", metavar="SIZE", help="Of a GPU that is not listed: 48GB.")
@click.option("--sm", metavar="N.N", help="Its compute capability: 8.9.")
@click.option(
    "--fit",
    metavar="SIZE|GPU",
    help="Find the largest micro-batch that fits 24GB (10^9 bytes), 22GiB, or a GPU's name.",
)
@click.option("--json", "json_path", type=click.Path(dir_okay=False), help="The report, in bytes.")
@click.option("--plot", metavar="FILE", help="What is live over two steps, as a picture.")
@click.option("--snapshot", type=click.Path(dir_okay=False), help="For pytorch.org/memory_viz.")
def command(deepspeed_config: str, settings: Sections, **options: Any) -> int:
    """Predict the memory of a training step by category and phase, and on the device.

    The exit code is 3 where --fit finds nothing that fits, or the step does not fit on --gpu.
    """
    own = SimpleNamespace(**options)
    if own.plot:
        with blame("--plot"):
            import matplotlib  # noqa: F401
        if not own.plot.endswith((".png", ".svg", ".pdf")):
            raise UserError(f"--plot is {own.plot!r}: end its name in .png, .svg or .pdf")
        check_writable(own.plot)
    config = load_preset(None, settings)
    silence()
    ds_config = DeepSpeedConfig.load(deepspeed_config)
    if own.checkpointing:
        section: JsonObject | None = None if own.checkpointing == "off" else {}
        ds_config = DeepSpeedConfig.of({**ds_config, "activation_checkpointing": section})
    content, fits = single(config, ds_config, own)
    if own.json_path:
        path = Path(own.json_path)
        text = json.dumps(content, indent=2) + "\n"
        write(own.json_path, "--json", lambda: path.write_text(text))
    return 0 if fits else 3


def single(
    config: Config, ds_config: DeepSpeedConfig, own: SimpleNamespace
) -> tuple[JsonObject, bool]:
    """Predict one setting, or find the largest micro-batch that fits.

    Returns the report, and False where that does not fit.
    """
    from ds_cmli.memory.fit import fit
    from ds_cmli.memory.step_memory import Step, predicted_worst

    if config.run.compile != "off":
        tell(UNCOMPILED)
    chosen = gpus.chosen(own.gpu, own.gpu_memory, own.sm)
    room, fitted_gpu = parse_memory(own.fit) if own.fit else (0, None)
    gpu = chosen or gpus.find(fitted_gpu or default_gpu())
    step, fitted = Step(config, ds_config, own.world_size), None
    if own.fit:
        fitted = fit(step, gpu, room, tell)
        report = fitted.report
        tell("")
        print(fit_sentence(fitted, room))
        print(meant(own.fit, room, fitted_gpu or "", gpu, report))
    else:
        report = predicted_worst(step, gpu, gpu.total.bytes)
        print(sentence(report, gpu))
    show(report)
    if fitted is not None:
        print_fit(fitted, room)
    if own.snapshot:
        from ds_cmli.memory_model import snapshot

        write(own.snapshot, "--snapshot", lambda: snapshot.write(report.events, own.snapshot))
    if own.plot:
        write(own.plot, "--plot", lambda: plot(report, own.plot))
    fits = chosen is None or report.totals["device"] <= chosen.total.bytes
    return report.to_dict(), fits if fitted is None else fitted.micro_batch > 0


def parse_memory(text: str) -> tuple[int, str | None]:
    """Of --fit: "24GB" -> (24 * 10^9, None); a GPU's name -> (its memory in bytes, the name)."""
    size = gpus.parse_bytes(text)
    if size is not None:
        return size, None
    gpu = gpus.find(text, "--fit")
    return gpu.total.bytes, gpu.name


def default_gpu() -> str:
    """The listed name of the first GPU in this machine, or of the one that is assumed."""
    import pynvml  # not torch, which sees no GPU here

    try:
        pynvml.nvmlInit()
        name = pynvml.nvmlDeviceGetName(pynvml.nvmlDeviceGetHandleByIndex(0))
        pynvml.nvmlShutdown()
    except pynvml.NVMLError:
        return gpus.DEFAULT
    return gpus.find(name, "this GPU").name


def sentence(report: Report, gpu: Gpu) -> str:
    """The answer in one sentence: whether the step fits on `gpu`."""
    total, needed_bytes = gpu.total.bytes, report.totals["device"]
    needed, has = gigabytes(needed_bytes, total)
    digits = len(has.partition(".")[2])
    (difference,) = gigabytes(abs(needed_bytes - total), digits=digits)
    setting = report.setting
    step = f"micro-batch {setting['micro_batch']} with ZeRO-{setting['zero_stage']}"
    step += f" over {setting['world_size']} GPUs"
    if setting.get("rank"):
        step += f" (rank {setting['rank']}, which needs the most)"
    if needed_bytes > total:
        verdict = f"does not fit on a {gpu.name} ({has} GB), by {difference} GB"
        return f"{step} needs {needed} GB and {verdict}: --fit {gpu.name!r} finds what does"
    left = f"{difference} GB are left{by_retries(report.retries)}"
    return f"{step} needs {needed} GB and fits on a {gpu.name} ({has} GB), {left}"


def fit_sentence(fitted: "Fit", room: int) -> str:
    """The answer in one sentence: what fits, and what one pair more needs."""
    more = fitted.tried.get(fitted.micro_batch + 1)
    size, one_more = gigabytes(room, more or room)
    if not fitted.micro_batch:
        return f"does not fit in {size} GB: one pair needs {one_more} GB"
    retries = by_retries(fitted.report.retries)
    out = f"fits in {size} GB with micro-batch {fitted.micro_batch}{retries}"
    return out if more is None else f"{out}; {fitted.micro_batch + 1} needs {one_more} GB"


def meant(fit: str, room: int, fitted_gpu: str, gpu: Gpu, report: Report) -> str:
    """What --fit was taken for, and how much of it tensors can have."""
    outside = report.totals["device"] - report.totals["reserved"]
    usable = max(room - outside, 0)
    rest = "CUDA's context"
    if report.setting["world_size"] > 1:
        rest = "CUDA's context and NCCL"
    left = f"{usable:,} B of them for tensors, the rest is {rest} as on a {gpu.name}"
    if fitted_gpu:
        return f"--fit {fit!r} means the {room:,} B that a {fitted_gpu} has: {left}"
    return f"--fit {fit!r} means {room:,} B of a GPU: {left}"


def print_fit(fitted: "Fit", room: int) -> None:
    sizes = gigabytes(*fitted.tried.values())
    tried = ", ".join(f"{n}: {size} GB" for n, size in zip(fitted.tried, sizes, strict=True))
    print(f"tried, micro-batch: on the device: {tried}")
    if fitted.micro_batch:
        size = fitted.tried[fitted.micro_batch]
        answer = f"the largest micro-batch that fits in {room:,} B: {fitted.micro_batch}"
        print(f"{answer}, with {size:,} B on the device")
    else:
        answer = f"not even one pair per rank fits in {room:,} B"
        print(f"{answer}: it takes {fitted.tried[1]:,} B on the device")


def tell(line: str) -> None:
    """Show progress on stderr: on a terminal in one line that changes, elsewhere in a line each."""
    if sys.stderr.isatty():
        print(f"\r\033[K{line}", end="", file=sys.stderr, flush=True)
    elif line:
        print(line, file=sys.stderr, flush=True)


def write(path: str, setting: str, function: Callable[[], object]) -> None:
    try:
        function()
    except OSError as error:
        raise UserError(f"{setting} is {path!r}: cannot write there: {error.strerror}") from None


def main() -> None:
    run_command(command)
