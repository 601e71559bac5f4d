"""python profiling/scale.py [--preset paper] [--ranks 1,8,64,512,4096]

What a step takes on many ranks: time, its parts, and memory, with texts gathered or in a ring, with gradient caching or
without, at ZeRO stages 1 to 3. What is moved and what memory holds is predicted from the trainer's own step; times
follow from the rates given here (see ds_cmli/memory/scale.py), of which none was measured unless --measure is given.
"""

import sys

sys.path[:] = [p for p in sys.path if p != __file__.rsplit("/", 1)[0]]

import json  # noqa: E402
import os  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import click  # noqa: E402

from ds_cmli.common.cli import GroupedCommand, check_writable, option, run_command  # noqa: E402
from ds_cmli.common.errors import UserError  # noqa: E402
from ds_cmli.common.plots import check_installed  # noqa: E402

PARTS = ("model", "scores", "text", "rest")


@click.command(cls=GroupedCommand, context_settings={"help_option_names": ["-h", "--help"]}, help=__doc__)
@option("Setting", "--preset", default="paper", show_default=True, help="As train.py's.")
@option("Setting", "--set", "settings", multiple=True, metavar="SECTION.SETTING=VALUE", help="As train.py's.")
@option("Setting", "--ranks", default="1,8,64,512,4096", show_default=True, help="Numbers of ranks.")
@option("Setting", "--stages", default="1,2,3", show_default=True, help="ZeRO stages.")
@option("Setting", "--accumulation", default=4, show_default=True, help="Micro-batches of a step.")
@option("Setting", "--checkpointing", is_flag=True, help="With activation checkpointing.")
@option("Setting", "--gpu", default="RTX 3090 24GB", show_default=True, help="As profiling/predict.py's.")
@option("Setting", "--target", default="cuda", show_default=True, type=click.Choice(["cuda", "cpu"]))
@option("Rates", "--tflops", default=60.0, show_default=True, help="TFLOP/s that a rank reaches.")
@option("Rates", "--measure", is_flag=True, help="Measure --tflops on this machine instead.")
@option("Rates", "--node-bandwidth", default=25.0, show_default=True, help="GB/s that a rank sends in its node.")
@option("Rates", "--bandwidth", default=5.0, show_default=True, help="GB/s that it sends between nodes.")
@option("Rates", "--latency", default=10.0, show_default=True, help="Microseconds of a message.")
@option("Rates", "--ranks-per-node", default=8, show_default=True)
@option("Output", "--json", "json_path", metavar="FILE", help="The rows, one object each.")
@option("Output", "--plot", "plot_path", metavar="FILE", help="A picture; needs matplotlib.")
def command(preset: str, settings: tuple[str, ...], json_path: str | None, plot_path: str | None, **given: Any) -> None:
    if plot_path is not None:
        check_installed("--plot")
    for name in (json_path, plot_path):
        if name is not None:
            check_writable(name)
    numbers = {name: listed(f"--{name}", given[name]) for name in ("ranks", "stages")}
    os.environ["DS_ACCELERATOR"] = "cpu"  # predictions need it before DeepSpeed is imported
    from ds_cmli.common import quiet

    quiet.silence()
    import torch
    from rich.console import Console

    from ds_cmli.common.tables import Table
    from ds_cmli.config.presets import load_preset
    from ds_cmli.config.schema import parse_settings
    from ds_cmli.engine.throughput import peak_flops
    from ds_cmli.memory import gpus
    from ds_cmli.memory.scale import Rates, crossovers, step_cost, step_time

    tflops = given["tflops"]
    if given["measure"]:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        tflops = peak_flops(device, torch.float16 if device.type == "cuda" else torch.float32) / 1e12
    rates = Rates(
        tflops * 1e12, given["node_bandwidth"] * 1e9, given["bandwidth"] * 1e9, given["latency"] * 1e-6,
        given["ranks_per_node"],
    )  # fmt: skip
    config = load_preset(preset, parse_settings(settings))
    costs, rows = [], []
    for stage in numbers["stages"]:
        ds_config: dict[str, Any] = {
            "gradient_accumulation_steps": given["accumulation"],
            "zero_optimization": {"stage": stage},
            "fp16" if given["target"] == "cuda" else "bf16": {"enabled": True},
            **({"activation_checkpointing": {}} if given["checkpointing"] else {}),
        }
        for cached in (False, True) if given["accumulation"] > 1 else (False,):
            for ranks in numbers["ranks"]:
                for exchange in ("gather", "ring") if ranks > 1 else ("gather",):
                    cost = step_cost(config, ds_config, ranks, exchange, cached, given["target"], given["gpu"])
                    costs.append(cost)
                    rows.append(row(cost, step_time(cost, rates)))
                    click.echo("  ".join(cells(rows[-1])), err=True)  # the table comes at the end
    title = f"{preset}: a step of {given['accumulation']} x {config.optim.micro_batch} pairs a rank"
    columns = ["ZeRO", "cached", "ranks", "exchange", *(f"{part} ms" for part in PARTS), "step ms", "calls"]
    table = Table(title, [*columns, "sent GB", "memory GB"], [cells(r) for r in rows], [
        f"rates: {tflops:.3g} TFLOP/s {'measured' if given['measure'] else 'assumed'}, "
        f"{given['node_bandwidth']:g} GB/s "
        f"in a node of {given['ranks_per_node']}, {given['bandwidth']:g} GB/s between nodes, {given['latency']:g} us",
        *crossovers(costs, rates, gpus.find(given["gpu"]).total.bytes),
    ])  # fmt: skip
    table.show(Console(width=150))
    if json_path is not None:
        Path(json_path).write_text(json.dumps(rows, indent=1))
    if plot_path is not None:
        draw(rows, title, plot_path)


def listed(name: str, text: str) -> list[int]:
    numbers = [int(part) if part.strip().isdecimal() else 0 for part in text.split(",")]
    if not all(numbers):
        raise UserError(f"{name} is {text!r}: give positive numbers, for instance 1,8,64")
    return numbers


def row(cost: Any, seconds: dict[str, float]) -> dict[str, Any]:
    """One object of --json: seconds, bytes, and what is moved by part and kind."""
    sent = sum(count.sent(kind, cost.ranks) for (_, kind), count in cost.counts.items())
    moved = {f"{part} {kind}": {"calls": c.calls, "bytes": c.bytes} for (part, kind), c in cost.counts.items()}
    return {
        "zero_stage": cost.stage, "cached": cost.cached, "ranks": cost.ranks, "exchange": cost.exchange,
        "seconds": {**seconds, "step": sum(seconds.values())}, "calls": sum(c.calls for c in cost.counts.values()),
        "sent": sent, "memory": cost.memory, "moved": moved,
    }  # fmt: skip


def cells(r: dict[str, Any]) -> list[str]:
    exchange = r["exchange"] if r["ranks"] > 1 else "-"
    return [
        str(r["zero_stage"]), "yes" if r["cached"] else "no", f"{r['ranks']:,}", exchange,
        *(f"{1e3 * r['seconds'][part]:,.1f}" for part in (*PARTS, "step")), f"{r['calls']:,}",
        f"{r['sent'] / 1e9:.2f}", f"{r['memory'] / 1e9:.2f}",
    ]  # fmt: skip


def draw(rows: list[dict[str, Any]], title: str, path: str) -> None:
    from ds_cmli.common.plots import matplotlib

    pyplot = matplotlib("--plot")
    figure, axes = pyplot.subplots(1, 2, figsize=(12, 5))
    for stage, cached, exchange in sorted({(r["zero_stage"], r["cached"], r["exchange"]) for r in rows}):
        own = [r for r in rows if (r["zero_stage"], r["cached"]) == (stage, cached)]
        own = [r for r in own if r["exchange"] == exchange or r["ranks"] == 1]
        label = f"ZeRO {stage}, {'cached, ' if cached else ''}{exchange}"
        style = "-" if exchange == "gather" else "--"
        for axis, value in zip(axes, (lambda r: r["seconds"]["step"], lambda r: r["memory"] / 1e9), strict=True):
            axis.plot([r["ranks"] for r in own], [value(r) for r in own], style, marker="o", label=label)
    for axis, name in zip(axes, ("seconds a step", "GB of a rank"), strict=True):
        axis.set(xscale="log", yscale="log", xlabel="ranks", ylabel=name)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=7)
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    run_command(command)
