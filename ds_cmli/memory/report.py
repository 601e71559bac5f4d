"""The common output of predictions and measurements: allocation events, and a report of them with
the same names.

All sizes are bytes. "Requested" is what the program asked for, "allocated" what the caching
allocator handed out for it (rounded up), "reserved" what the allocator took from the device, and
"device" all that the process occupies there.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

from ds_cmli.allocator.blocks import Event
from ds_cmli.common import plots

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
    "cached features",  # the features that gradient caching keeps, later replaced by their gradients
    "CMLI op",  # saved argmax indices, scores and scratch memory of the all-pairs operator
    "exchanged text",  # the other ranks' text features, and their gradients, which are sent back
    "data",
    "temporaries",
)
# In every chart and page; what lies beside each other in a stack differs most.
_OF_PALETTE = (3, 1, 2, 9, 12, 5, 6, 0, 8, 7, 10, 11, 4, 13)
COLOURS = {name: plots.COLOURS[i] for name, i in zip(CATEGORIES, _OF_PALETTE, strict=True)}
PHASES = ("init", "forward", "loss", "backward", "optimizer")


@dataclass
class Report:
    setting: dict[str, Any]  # preset, world size, batch and so on, for the report's readers
    source: str  # "predicted", "measured: CPU allocator", "measured: NVIDIA A10G", ...
    # Live at the moment of the requested peak; they add up to totals["requested"].
    categories: dict[str, int]
    phases: dict[str, int]  # the requested peak of each phase
    # Peaks: "requested", and "allocated", "reserved" and "device" where they are known.
    totals: dict[str, int]
    # (phase, live bytes by category).
    timeline: list[tuple[str, dict[str, int]]] = field(default_factory=list)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Report":
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        return {
            "setting": self.setting,
            "source": self.source,
            "categories": self.categories,
            "phases": self.phases,
            "totals": self.totals,
        }


TIMELINE_POINTS = 2000


def summarise(events: Iterable[Event], setting: dict[str, Any], source: str) -> Report:
    """Compute a report from `events`: live bytes by category at the peak, the peak of each phase,
    and the timeline.

    A phase's peak includes what was live when it began. The timeline holds at most
    `TIMELINE_POINTS` local maxima: the events are divided into that many stretches of equal length,
    and the largest maximum of each is kept.
    """
    events = list(events)
    totals = list(accumulate(event.bytes for event in events))
    phases = dict.fromkeys(PHASES, 0)
    before = 0
    for event, total in zip(events, totals, strict=True):
        phases[event.phase] = max(phases[event.phase], before, total)
        before = total

    number = len(events)
    tops = [
        i
        for i in range(number)
        if events[i].bytes > 0 and (i + 1 == number or events[i + 1].bytes < 0)
    ]
    largest: dict[int, int] = {}  # stretch -> event
    for i in tops:
        stretch = i * TIMELINE_POINTS // number
        if stretch not in largest or totals[i] > totals[largest[stretch]]:
            largest[stretch] = i
    kept = set(largest.values())

    peak = max(range(number), key=totals.__getitem__, default=None)
    live = dict.fromkeys(CATEGORIES, 0)
    at_peak, timeline = dict(live), []
    for i, event in enumerate(events):
        live[event.category] += event.bytes
        if i in kept:
            timeline.append((event.phase, dict(live)))
        if i == peak:
            at_peak = dict(live)
    return Report(setting, source, at_peak, phases, {"requested": sum(at_peak.values())}, timeline)


def gigabytes(*sizes: int, digits: int = 2) -> list[str]:
    """Sizes in GB, with at least `digits` decimals and as many as it takes for different sizes
    to read differently.
    """
    while True:
        out = [f"{size / 1e9:,.{digits}f}" for size in sizes]
        if digits >= 9 or len(set(out)) == len(set(sizes)):
            return out
        digits += 1


def show(report: Report, console: Any = None) -> None:
    """Print the report as tables, on a rich console; None: on the terminal."""
    from rich.console import Console
    from rich.table import Table

    console = console or Console(highlight=False)
    setting = ", ".join(
        f"{name.replace('_', ' ')} {_plain(value)}" for name, value in report.setting.items()
    )
    console.print(f"\nMemory of rank {report.setting.get('rank', 0)}, {report.source}: {setting}")
    requested = report.totals["requested"]
    for title, values in (("at the peak", report.categories), ("peak of phase", report.phases)):
        table = Table(title_justify="left")
        table.add_column(title)
        for name in ("bytes", "GB", "share"):
            table.add_column(name, justify="right")
        for name, size in values.items():
            table.add_row(
                name,
                *_sizes(size),
                f"{size / max(requested, 1):.1%}",
                style=None if size else "dim",
            )
        console.print(table)
    explained = {
        "requested": "the largest sum of all tensors and workspaces",
        "allocated": "rounded up by the allocator",
        "reserved": "taken from the device by the allocator",
        "device": "with the CUDA context and NCCL",
    }
    table = Table()
    for name in ("total", "bytes", "GB", ""):
        table.add_column(name, justify="right" if name in ("bytes", "GB") else "left")
    for name, size in report.totals.items():
        table.add_row(name, *_sizes(size), explained.get(name, ""))
    console.print(table)


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return " + ".join(value) if isinstance(value, list) else str(value)


def _sizes(size: int) -> tuple[str, str]:
    return f"{size:,}", f"{size / 1e9:.3f}"
