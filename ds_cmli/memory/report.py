"""The common output of predictions and measurements: a report of allocation events.

All sizes are bytes. "Requested" is what the program asked for, "allocated" what the caching
allocator handed out for it (rounded up), "reserved" what the allocator took from the device, and
"device" all that the process occupies there.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

from ds_cmli.files import JsonObject
from ds_cmli.memory_model.caching_allocator import Event

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
    "CMLI op",  # argmax indices, scores and scratch memory of the all-pairs operator
    "exchanged text",  # the other ranks' text features, and their gradients, which are sent back
    "data",
    "temporaries",
)
PHASES = ("init", "forward", "loss", "backward", "optimizer")
EXPLAINED = {
    "requested": "the largest sum of all tensors and workspaces",
    "allocated": "rounded up by the allocator",
    "reserved": "taken from the device by the allocator",
    "device": "with the CUDA context and NCCL",
}
ZERO_3_MARGIN = "with ZeRO-3 up to 5% more"  # measured on the null GPU, with checkpointing


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
    events: Sequence[Event] = field(default=(), repr=False)

    def to_dict(self) -> JsonObject:
        return {name: value for name, value in vars(self).items() if name != "events"}

    def take_totals(self, totals: dict[str, int]) -> None:
        """Replace the totals of what was recorded by measured ones.

        What the allocator counts beyond the record is added to the temporaries: the workspaces of
        libraries and operators.
        """
        self.categories["temporaries"] += totals["requested"] - self.totals["requested"]
        self.totals = totals

    @property
    def margin(self) -> str:
        """Say how much more than predicted the allocator may reserve; "": not more."""
        predicted = self.source == "predicted"
        return ZERO_3_MARGIN if predicted and self.setting.get("zero_stage") == 3 else ""


def summarise(events: Sequence[Event], setting: JsonObject, source: str) -> Report:
    """Compute the live bytes by category at the peak of `events`, and the peak of each phase."""
    categories = dict.fromkeys(CATEGORIES, 0)
    for event in live_at_peak(events):
        categories[event.category] += event.bytes
    phases = dict.fromkeys(PHASES, 0) | peaks_of_phases(events)
    totals = {"requested": sum(categories.values())}
    return Report(setting, source, categories, phases, totals, events=events)


def live_at_peak(events: Sequence[Event]) -> list[Event]:
    """Return the allocations, in order, that are live when the requested bytes are the most."""
    totals = [0, *accumulate(event.bytes for event in events)]
    end = totals.index(max(totals))  # of the events up to the peak
    live: dict[int, Event] = {}
    for event in events[:end]:
        if event.bytes > 0:
            live[event.block_id] = event
        elif event.bytes < 0:
            del live[event.block_id]
    return list(live.values())


def peaks_of_phases(events: Sequence[Event]) -> dict[str, int]:
    """Return the most bytes requested in each phase, with what was live when it began."""
    total = 0
    peaks: dict[str, int] = {}
    for event in events:
        at_start = total
        total += event.bytes
        peaks[event.phase] = max(peaks.get(event.phase, 0), at_start, total)
    return peaks


def gigabytes(*sizes: int, digits: int = 2) -> list[str]:
    """Format sizes in GB, with as many decimals as make different sizes read differently.

    There are at least `digits` decimals.
    """
    while True:
        texts = [f"{size / 1e9:,.{digits}f}" for size in sizes]
        if digits >= 9 or len(set(texts)) == len(set(sizes)):
            return texts
        digits += 1


def retries_clause(count: int) -> str:
    """Say that a step fits only by so many retries of the allocator; 0: say nothing."""
    retries = "1 retry" if count == 1 else f"{count} retries"
    return f", only as PyTorch's allocator returns its cache ({retries})" if count else ""


def show(report: Report) -> None:
    """Print the report as tables."""
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
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
            table.add_row(name, *bytes_and_gigabytes(size), f"{size / requested:.1%}", style=style)
        console.print(table)
    table = Table()
    for name in ("total", "bytes", "GB", ""):
        table.add_column(name, justify="right" if name in ("bytes", "GB") else "left")
    for name, size in report.totals.items():
        explained = EXPLAINED.get(name, "")
        if name == "reserved" and report.margin:
            explained += f"; {report.margin}"
        table.add_row(name, *bytes_and_gigabytes(size), explained)
    console.print(table)


def _plain(value: object) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, list):
        return " + ".join(value)
    return str(value)


def bytes_and_gigabytes(size: int) -> tuple[str, str]:
    return f"{size:,}", f"{size / 1e9:.3f}"


def plot(report: Report, path: str) -> None:
    """Draw what is live over the events, by category."""
    import numpy as np
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    changes = np.zeros((len(CATEGORIES), len(report.events)))
    for number, event in enumerate(report.events):
        changes[CATEGORIES.index(event.category), number] = event.bytes
    live = changes.cumsum(1) / 1e9
    shown = [row for row in range(len(CATEGORIES)) if live[row].any()]
    # Each column of the picture is the most of its events: the peak may last for only one.
    columns = np.array_split(np.arange(live.shape[1]), min(300, live.shape[1]))
    starts = [column[0] for column in columns]
    peaks = [column[live[:, column].sum(0).argmax()] for column in columns]
    categories = [CATEGORIES[row] for row in shown]
    names = [f"{name}, {report.categories[name] / 1e9:.2f} GB" for name in categories]
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axis = figure.subplots()
    colours = [colormaps["tab20"](row) for row in shown]
    style: dict[str, Any] = {"colors": colours, "linewidth": 0, "step": "mid"}
    axis.stackplot(starts, live[shown][:, peaks], labels=names, **style)
    (requested,) = gigabytes(report.totals["requested"])
    title = f"Memory of a step, {report.source}: {requested} GB at the peak"
    axis.set(xlabel="allocations and frees of two steps", ylabel="GB", title=title)
    axis.legend(
        title="at the peak", loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, reverse=True
    )
    figure.savefig(path)
