"""python -m profiling.speed.scale [--preset paper] [--ranks 1,8,64,512,4096]

What a step takes on many ranks: time, its parts, and memory, with texts gathered or in a ring, with
gradient caching or without, at ZeRO stages 1 to 3. What is moved and what memory holds is predicted
from the trainer's own step; times follow from the rates given here (see profiling/speed/scaling.py), of
which none was measured. On a GPU of profiling/speed/gpu_rates.py the time of the
all-pairs scores is computed from the op's kernels, compiled for it, and a step's next to it where
`loss.cmli_cut` keeps 30, 10 or 3% of the pairs.
"""

import json
import math
import os
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ds_cmli.common.cli import GroupedCommand, check_writable, option, run_command
from ds_cmli.common.plots import check_picture
from profiling.scripts import listed, picture, plain, written
from profiling.speed.gpu_rates import EFFICIENCY, at_limits, rates_of

if TYPE_CHECKING:
    from profiling.speed.scaling import Rates, StepCost

PARTS = ("model", "scores", "text", "rest")
KEPT = (0.3, 0.1, 0.03)  # shares of the pairs that a cut leaves
TEXTS = 2**16  # that the time of the scores is computed for at most


@click.command(
    cls=GroupedCommand, context_settings={"help_option_names": ["-h", "--help"]}, help=__doc__
)
@option("Setting", "--preset", default="paper", show_default=True, help="As train.py's.")
@option(
    "Setting", "--set", "settings", multiple=True, metavar="SECTION.SETTING=VALUE", help="So too."
)
@option("Setting", "--ranks", default="1,8,64,512,4096", show_default=True, help="Their numbers.")
@option("Setting", "--stages", default="1,2,3", show_default=True, help="ZeRO stages.")
@option("Setting", "--accumulation", default=4, show_default=True, help="Micro-batches of a step.")
@option("Setting", "--checkpointing", is_flag=True, help="With activation checkpointing.")
@option("Setting", "--gpu", default="RTX 3090 24GB", show_default=True, help="As predict.py's.")
@option(
    "Setting", "--target", default="cuda", show_default=True, type=click.Choice(["cuda", "cpu"])
)
@option("Rates", "--tflops", default=60.0, show_default=True, help="TFLOP/s that a rank reaches.")
@option(
    "Rates",
    "--efficiency",
    default=EFFICIENCY,
    show_default=True,
    help="Share of the GPU's limits that the kernels of the all-pairs scores reach.",
)
@option("Rates", "--node-bandwidth", default=25.0, show_default=True, help="GB/s sent in a node.")
@option("Rates", "--bandwidth", default=5.0, show_default=True, help="GB/s between nodes.")
@option("Rates", "--latency", default=10.0, show_default=True, help="Microseconds of a message.")
@option("Rates", "--ranks-per-node", default=8, show_default=True)
@option("Output", "--json", "json_path", metavar="FILE", help="The rows, one object each.")
@option("Output", "--plot", "plot_path", metavar="FILE", help="A picture; needs matplotlib.")
def command(
    preset: str,
    settings: tuple[str, ...],
    json_path: str | None,
    plot_path: str | None,
    **given: Any,
) -> None:
    check_picture("--plot", plot_path)
    if json_path is not None:
        check_writable(json_path)
    numbers = {name: listed(f"--{name}", given[name], int) for name in ("ranks", "stages")}
    os.environ["DS_ACCELERATOR"] = "cpu"  # predictions need it before DeepSpeed is imported
    from ds_cmli.common import quiet

    quiet.silence()
    from rich.console import Console

    from ds_cmli.allocator import gpus
    from ds_cmli.config.presets import load_preset
    from ds_cmli.config.schema import parse_settings
    from profiling.scripts import Table
    from profiling.speed.scaling import Rates, crossovers, step_cost

    rates = Rates(
        given["tflops"] * 1e12, given["node_bandwidth"] * 1e9, given["bandwidth"] * 1e9, given["latency"] * 1e-6,
        given["ranks_per_node"], computed_scores(given["target"], given["gpu"], given["efficiency"]),
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
                    cost = step_cost(
                        config, ds_config, ranks, exchange, cached, given["target"], given["gpu"]
                    )
                    costs.append(cost)
                    rows.append(row(cost, rates))
                    click.echo("  ".join(cells(rows[-1])), err=True)  # the table comes at the end
    title = f"{preset}: a step of {given['accumulation']} x {config.optim.micro_batch} pairs a rank"
    columns = ["ZeRO", "cached", "ranks", "exchange", *(f"{part} ms" for part in PARTS), "step ms"]
    columns += [] if rates.scores is None else [f"{kept:.0%} kept" for kept in KEPT]
    table = Table(title, [*columns, "calls", "sent GB", "memory GB"], [cells(r) for r in rows], [
        f"rates, assumed: {given['tflops']:.3g} TFLOP/s, "
        f"{given['node_bandwidth']:g} GB/s "
        f"in a node of {given['ranks_per_node']}, {given['bandwidth']:g} GB/s between nodes, {given['latency']:g} us",
        "scores: " + (
            "at the same rate" if rates.scores is None else
            f"computed from the kernels for {given['gpu']} at {given['efficiency']:.0%} of its limits, texts of full length"
        ),
        *crossovers(costs, rates, gpus.find(given["gpu"]).total.bytes),
    ])  # fmt: skip
    table.show(Console(width=150))
    if json_path is not None:
        Path(json_path).write_text(json.dumps(rows, indent=1))
    if plot_path is not None:
        draw(rows, title, plot_path)


def computed_scores(
    target: str, gpu: str, efficiency: float
) -> "Callable[[StepCost, float], float] | None":
    """What gives the seconds of a step's all-pairs scores in fp16, if a share of the pairs is kept; None on a CPU, for a
    GPU whose rates are not listed, and without triton."""
    rates = rates_of(gpu) if target == "cuda" else None
    if rates is None or find_spec("triton") is None:
        return None
    from profiling.speed.kernel_work import Kernels, Sizes

    def seconds(cost: "StepCost", kept: float) -> float:
        if cost.sizes is None:
            return 0.0
        sizes = Sizes(*cost.sizes)
        calls = math.ceil(sizes.J / TEXTS)  # the time grows with the texts
        sizes = sizes._replace(J=math.ceil(sizes.J / calls))
        kernels = Kernels(rates, "fp16", sizes, {sizes.M: sizes.J})
        phases = [kernels.forward(indices=not cost.scores_twice), *kernels.backward(kept)]
        if cost.scores_twice:
            phases.append(kernels.forward(kept))
        return cost.accumulation * calls * at_limits(phases, rates) / 1e3 / efficiency

    return seconds


def row(cost: "StepCost", rates: "Rates") -> dict[str, Any]:
    """One object of --json: seconds, bytes, and what is moved by part and kind."""
    from profiling.speed.scaling import step_time

    seconds = step_time(cost, rates)
    shares = () if rates.scores is None else KEPT
    kept = {str(k): sum(step_time(cost, rates, k).values()) for k in shares}
    sent = sum(count.sent(kind, cost.ranks) for (_, kind), count in cost.counts.items())
    moved = {
        f"{part} {kind}": {"calls": c.calls, "bytes": c.bytes}
        for (part, kind), c in cost.counts.items()
    }
    return {
        "zero_stage": cost.stage, "cached": cost.cached, "ranks": cost.ranks, "exchange": cost.exchange,
        "seconds": {**seconds, "step": sum(seconds.values())}, "seconds_kept": kept,
        "calls": sum(c.calls for c in cost.counts.values()), "sent": sent, "memory": cost.memory, "moved": moved,
    }  # fmt: skip


def cells(r: dict[str, Any]) -> list[str]:
    exchange = r["exchange"] if r["ranks"] > 1 else "-"
    return [
        str(r["zero_stage"]), "yes" if r["cached"] else "no", f"{r['ranks']:,}", exchange,
        *(f"{1e3 * r['seconds'][part]:,.1f}" for part in (*PARTS, "step")),
        *(f"{1e3 * seconds:,.1f}" for seconds in r["seconds_kept"].values()), f"{r['calls']:,}",
        f"{r['sent'] / 1e9:.2f}", f"{r['memory'] / 1e9:.2f}",
    ]  # fmt: skip


def draw(rows: list[dict[str, Any]], title: str, path: str) -> None:
    """Seconds a step and memory of a rank over the ranks, a line for each way, named at its end."""
    from ds_cmli.common import plots

    figure, axes = picture(4, columns=2)
    ways = sorted({(r["zero_stage"], r["cached"], r["exchange"]) for r in rows})
    several = len({stage for stage, _, _ in ways}) > 1
    measures: list[tuple[str, Callable[[dict[str, Any]], float]]] = [
        ("s", lambda r: r["seconds"]["step"]), ("GB", lambda r: r["memory"] / 1e9),
    ]  # fmt: skip
    for axis, (unit, value) in zip(axes, measures, strict=True):
        ends = []
        for number, (stage, cached, exchange) in enumerate(ways):
            own = {}  # by ranks; one rank has no exchange
            for r in rows:
                same = (r["zero_stage"], r["cached"]) == (stage, cached)
                if same and (r["exchange"] == exchange or r["ranks"] == 1):
                    own[r["ranks"]] = value(r)
            colour, style = plots.line(number)
            axis.plot([*own], [*own.values()], style, color=colour, marker="o", markersize=4)
            label = f"{f'ZeRO-{stage} ' if several else ''}{exchange}{', cached' if cached else ''}"
            ends.append((math.log([*own.values()][-1]), label, colour))
        axis.set(xscale="log", yscale="log", xlabel="ranks")
        axis.set_xticks(sorted({r["ranks"] for r in rows}))
        axis.tick_params(axis="x", labelsize=8)
        low, high = (math.log(end) for end in axis.get_ylim())
        places = plots.apart([end for end, *_ in ends], 0.06 * (high - low))
        look = {"size": 9, "va": "center", "transform": axis.get_yaxis_transform()}
        for place, (_, label, colour) in zip(places, ends, strict=True):
            axis.text(1.03, math.exp(place), label, color=colour, **look)
        axis.xaxis.set_major_formatter(plain)
        axis.yaxis.set_major_formatter(lambda v, _, u=unit: f"{plain(v)} {u}")
        axis.minorticks_off()
        axis.grid(axis="y")
    axes[1].set_title("memory of a rank", size=9.5, weight="normal", color=plots.SOFT)
    written(figure, path, finding(rows, title), "time of a step")


def finding(rows: list[dict[str, Any]], title: str) -> str:
    """What a ring costs and saves on most ranks, without gradient caching at the first stage."""
    ranks = max(r["ranks"] for r in rows)
    first = rows[0]["zero_stage"], rows[0]["cached"]
    most = [r for r in rows if r["ranks"] == ranks and (r["zero_stage"], r["cached"]) == first]
    at = {r["exchange"]: r for r in most}
    if len(at) < 2:
        return title
    memory = at["ring"]["memory"] / at["gather"]["memory"]
    time = at["ring"]["seconds"]["step"] / at["gather"]["seconds"]["step"]
    return f"Computed: on {ranks:,} ranks a ring takes {memory:.0%} of gathering's memory and {time:.0%} of its time"


if __name__ == "__main__":
    run_command(command)
