"""The common output of predictions and measurements: a report of allocation events.

All sizes are bytes. "Requested" is what the program asked for, "allocated" what the caching
allocator handed out for it (rounded up), "reserved" what the allocator took from the device, and
"device" all that the process occupies there.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ds_cmli.common import plots
from ds_cmli.common.json_text import JsonObject
from ds_cmli.memory_model.blocks import Event, live_at_peak, peaks_of_phases

if TYPE_CHECKING:
    from rich.console import Console

CATEGORIES = (
    "parameters",
    "gradients",
    "optimizer states",
    "master weights",  # the fp32 copy of this rank's share of the parameters
    "EMA weights",  # the moving average of the master weights, with `optim.ema_decay`
    "ZeRO buckets",
    "teacher",
    "activations student",
    "activations teacher",
    "cached features",  # what gradient caching keeps, later replaced by the gradients
    "CMLI op",  # saved argmax indices, scores and scratch memory of the all-pairs operator
    "exchanged text",  # the other ranks' text features, and their gradients, which are sent back
    "data",
    "temporaries",
)
# In every chart and page; neighbours in a stack differ most.
_OF_PALETTE = (3, 1, 2, 9, 12, 5, 6, 0, 8, 7, 10, 11, 4, 13)
COLOURS = {name: plots.COLOURS[i] for name, i in zip(CATEGORIES, _OF_PALETTE, strict=True)}
PHASES = ("init", "forward", "loss", "backward", "optimizer")
EXPLAINED = {
    "requested": "the largest sum of all tensors and workspaces",
    "allocated": "rounded up by the allocator",
    "reserved": "taken from the device by the allocator",
    "device": "with the CUDA context and NCCL",
}


@dataclass
class Report:
    setting: JsonObject  # preset, world size, batch and so on, for the report's readers
    source: str  # "predicted", "measured: CPU allocator", "measured: NVIDIA A10G", ...
    # Live at the moment of the requested peak; they add up to totals["requested"].
    categories: dict[str, int]
    phases: dict[str, int]  # the requested peak of each phase
    # Peaks: "requested", and "allocated", "reserved" and "device" where they are known.
    totals: dict[str, int]
    retries: int = 0  # of the allocator, which then returned its cache for lack of room

    def to_dict(self) -> JsonObject:
        return dict(vars(self))


def summarise(events: Sequence[Event], setting: JsonObject, source: str) -> Report:
    """Compute the live bytes by category at the peak of `events`, and the peak of each phase."""
    categories = dict.fromkeys(CATEGORIES, 0)
    for event in live_at_peak(events):
        categories[event.category] += event.bytes
    phases = dict.fromkeys(PHASES, 0) | peaks_of_phases(events)
    return Report(setting, source, categories, phases, {"requested": sum(categories.values())})


def gigabytes(*sizes: int, digits: int = 2) -> list[str]:
    """Sizes in GB, with as many decimals as it takes for different sizes to read differently.

    There are at least `digits` decimals.
    """
    while True:
        out = [f"{size / 1e9:,.{digits}f}" for size in sizes]
        if digits >= 9 or len(set(out)) == len(set(sizes)):
            return out
        digits += 1


def show(report: Report, console: "Console | None" = None) -> None:
    """Print the report as tables, on a rich console; None: on the terminal."""
    from rich.console import Console
    from rich.table import Table

    console = console or Console(highlight=False)
    settings = []
    for name, value in report.setting.items():
        settings.append(f"{name.replace('_', ' ')} {_plain(value)}")
    rank = report.setting.get("rank", 0)
    console.print(f"\nMemory of rank {rank}, {report.source}: {', '.join(settings)}")
    requested = max(report.totals["requested"], 1)
    for title, values in (("at the peak", report.categories), ("peak of phase", report.phases)):
        table = Table(title_justify="left")
        table.add_column(title)
        for name in ("bytes", "GB", "share"):
            table.add_column(name, justify="right")
        for name, size in values.items():
            style = None if size else "dim"
            table.add_row(name, *_sizes(size), f"{size / requested:.1%}", style=style)
        console.print(table)
    table = Table()
    for name in ("total", "bytes", "GB", ""):
        table.add_column(name, justify="right" if name in ("bytes", "GB") else "left")
    for name, size in report.totals.items():
        table.add_row(name, *_sizes(size), EXPLAINED.get(name, ""))
    console.print(table)


def _plain(value: object) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, list):
        return " + ".join(value)
    return str(value)


def _sizes(size: int) -> tuple[str, str]:
    return f"{size:,}", f"{size / 1e9:.3f}"
