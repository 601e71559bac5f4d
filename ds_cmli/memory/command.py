"""Predict the memory that a training needs: `ds-cmli-memory`, or `python profiling/predict.py`.

It runs the real training step on tensors without data, which takes seconds, needs no GPU and
downloads nothing. It takes the options of train.py.
"""

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import click

from ds_cmli.commands import noun, run_command
from ds_cmli.config.deepspeed_config import DeepSpeedConfig
from ds_cmli.config.options import ConfigCommand
from ds_cmli.config.presets import load_preset
from ds_cmli.config.schema import Config, Sections
from ds_cmli.errors import UserError, blame
from ds_cmli.files import JsonObject, check_writable
from ds_cmli.libraries import silence
from ds_cmli.memory.progress import Progress
from ds_cmli.memory.report import Report, gigabytes, plot, retries_clause, show
from ds_cmli.memory_model import gpus
from ds_cmli.memory_model.gpus import Gpu

if TYPE_CHECKING:
    from ds_cmli.memory.largest_batch import LargestBatch

# A prediction leaves a GPU of this machine alone.
os.environ["CUDA_VISIBLE_DEVICES"] = ""
UNCOMPILED = "run.compile: predicted without, as what a compiler keeps shows only when it has run"


@click.command(cls=ConfigCommand, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--world-size", type=click.IntRange(1), default=1, show_default=True, help="Number of ranks."
)
@click.option(
    "--checkpointing",
    type=click.Choice(["on", "off"]),
    help="Activation checkpointing.  [the JSON's]",
)
@click.option(
    "--gpu", help="GPU that is predicted, as nvidia-smi names it.  [the one here, or RTX 3090 24GB]"
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
def command(deepspeed_config: str, settings: Sections, **values: Any) -> int:
    """Predict the memory of a training step by category and phase, and on the device.

    The exit code is 3 where --fit finds nothing that fits, or the step does not fit on --gpu.
    """
    options = SimpleNamespace(**values)
    if options.plot:
        with blame("--plot"):
            import matplotlib  # noqa: F401
        if not options.plot.endswith((".png", ".svg", ".pdf")):
            raise UserError(f"--plot is {options.plot!r}: end its name in .png, .svg or .pdf")
    for path in (options.plot, options.snapshot, options.json_path):
        if path:
            check_writable(path)
    config = load_preset(None, settings)
    silence()
    ds_config = DeepSpeedConfig.load(deepspeed_config)
    if options.checkpointing:
        section: JsonObject | None = None if options.checkpointing == "off" else {}
        ds_config = DeepSpeedConfig.of({**ds_config, "activation_checkpointing": section})
    report, fits = predict(config, ds_config, options)
    if options.snapshot:
        from ds_cmli.memory_model import snapshot

        with blame("--snapshot"):
            snapshot.write(report.events, options.snapshot)
    if options.plot:
        with blame("--plot"):
            plot(report, options.plot)
    if options.json_path:
        with blame("--json"):
            Path(options.json_path).write_text(json.dumps(report.to_dict(), indent=2) + "\n")
    return 0 if fits else 3


def predict(
    config: Config, ds_config: DeepSpeedConfig, options: SimpleNamespace
) -> tuple[Report, bool]:
    """Print one setting or the largest micro-batch; return its report, and whether it fits."""
    from ds_cmli.memory.largest_batch import find_largest_batch
    from ds_cmli.memory.step_memory import Step, predicted_worst

    listed = gpus.from_options(options.gpu, options.gpu_memory, options.sm)
    room, fitted_gpu = parse_memory(options.fit) if options.fit else (0, None)
    gpu = listed or gpus.find(fitted_gpu or default_gpu())
    if config.run.compile != "off":
        click.echo(UNCOMPILED, err=True)
    if gpu.capability[0] == 10:
        click.echo(triton_line(gpu), err=True)
    step = Step(config, ds_config, options.world_size)
    if options.fit:
        largest = find_largest_batch(step, gpu, room, Progress())
        print(fit_sentence(largest, room))
        print(room_sentence(options.fit, room, fitted_gpu or "", gpu, largest.report))
        show(largest.report)
        sizes = gigabytes(*largest.tried.values())
        tried = ", ".join(f"{n}: {size} GB" for n, size in zip(largest.tried, sizes, strict=True))
        print(f"tried, micro-batch: on the device: {tried}")
        return largest.report, largest.micro_batch > 0
    progress = Progress(num_trials=1)
    ranks = "one rank" if options.world_size == 1 else f"one of {options.world_size} ranks"
    progress.begin(f"a step of {ranks}, on tensors without data")
    report = predicted_worst(step, gpu, gpu.total_bytes)
    progress.end()
    print(sentence(report, gpu))
    show(report)
    return report, listed is None or report.totals["device"] <= listed.total_bytes


def triton_line(gpu: Gpu) -> str:
    """Say by which kernels a Blackwell GPU is predicted, which depends on the version of Triton."""
    import triton

    from ds_cmli.cmli.triton_forward import why_not_capability

    reason = why_not_capability(gpu.capability) or "its kernels run there"
    return f"{gpu.name}: predicted with this machine's Triton {triton.__version__}: {reason}"


def parse_memory(text: str) -> tuple[int, str | None]:
    """Read --fit: "24GB" -> (24 * 10^9, None); a GPU's name -> (its memory in bytes, the name)."""
    size = gpus.parse_bytes(text)
    if size is not None:
        return size, None
    gpu = gpus.find(text, "--fit")
    return gpu.total_bytes, gpu.name


def default_gpu() -> str:
    """Return the listed name of this machine's first GPU, or of the GPU that is assumed."""
    import pynvml  # not torch, which sees no GPU here

    try:
        pynvml.nvmlInit()
        name = pynvml.nvmlDeviceGetName(pynvml.nvmlDeviceGetHandleByIndex(0))
        pynvml.nvmlShutdown()
    except pynvml.NVMLError:
        return gpus.DEFAULT
    return gpus.find(name, "this GPU").name


def sentence(report: Report, gpu: Gpu) -> str:
    """Answer in one sentence whether the step fits on `gpu`."""
    total = gpu.total_bytes
    occupied = report.totals["device"]
    occupied_gb, available, difference = gigabytes(occupied, total, abs(occupied - total))
    setting = report.setting
    num_gpus = setting["world_size"]
    step = f"micro-batch {setting['micro_batch']} with ZeRO-{setting['zero_stage']}"
    step += f" over {num_gpus} {noun(num_gpus, 'GPU')}"
    if setting.get("rank"):
        step += f" (rank {setting['rank']}, which needs the most)"
    needs = f"{step} needs {occupied_gb} GB"
    if report.margin:
        needs += f" ({report.margin})"
    if occupied > total:
        verdict = f"does not fit on the {gpu.name} ({available} GB), by {difference} GB"
        return f"{needs} and {verdict}: --fit {gpu.name!r} finds what does"
    left = f"{difference} GB are left{retries_clause(report.retries)}"
    return f"{needs} and fits on the {gpu.name} ({available} GB), {left}"


def fit_sentence(largest: "LargestBatch", room: int) -> str:
    """Answer in one sentence what fits, and what one pair more needs."""
    one_more_bytes = largest.tried.get(largest.micro_batch + 1)
    size, one_more = gigabytes(room, one_more_bytes or room)
    if not largest.micro_batch:
        return f"does not fit in {size} GB: one pair needs {one_more} GB"
    answer = f"fits in {size} GB with micro-batch {largest.micro_batch}"
    answer += retries_clause(largest.report.retries)
    if one_more_bytes is not None:
        answer += f"; {largest.micro_batch + 1} needs {one_more} GB"
    if largest.report.margin:
        answer += f"; {largest.report.margin} may be reserved"
    return answer


def room_sentence(fit: str, room: int, fitted_gpu: str, gpu: Gpu, report: Report) -> str:
    """Say what --fit was taken for, and how much of it tensors can have."""
    usable = max(room - (report.totals["device"] - report.totals["reserved"]), 0)
    overhead = "CUDA's context"
    if report.setting["world_size"] > 1:
        overhead += " and NCCL"
    left = f"{usable:,} B of them for tensors, the rest is {overhead} as on the {gpu.name}"
    if fitted_gpu:
        return f"--fit {fit!r} means the {room:,} B that the {fitted_gpu} has: {left}"
    return f"--fit {fit!r} means {room:,} B of a GPU: {left}"


def main() -> None:
    run_command(command)
