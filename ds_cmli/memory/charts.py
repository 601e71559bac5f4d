"""Pictures of the comparison (one bar per figure) and of memory over time. They need matplotlib."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ds_cmli.common.plots import matplotlib
from ds_cmli.memory.compare import GB, Row
from ds_cmli.memory.report import CATEGORIES, Event


def bars(rows: Sequence[Row], path: Path) -> None:
    """Draw the source document's, the true and the measured bytes of each row on a logarithmic axis."""
    pyplot = matplotlib("a chart")
    figure, axis = pyplot.subplots(figsize=(11, 0.55 * len(rows) + 1.6), constrained_layout=True)
    kinds = {"document": "document_bytes", "true": "corrected_bytes", "measured": "measured_bytes"}
    height = 0.8 / len(kinds)
    for k, (kind, name) in enumerate(kinds.items()):
        drawn = [(i + k * height, getattr(row, name)) for i, row in enumerate(rows) if getattr(row, name)]
        if drawn:
            axis.barh(*zip(*drawn, strict=True), height=height, label=kind)
            axis.bar_label(axis.containers[-1], [readable(size) for _, size in drawn], fontsize=7, padding=2)
    axis.set_yticks([i + height for i in range(len(rows))], [f"{row.id} {row.implementation}" for row in rows])
    axis.set(xscale="log", xlabel="bytes of the largest tensor")
    axis.margins(x=0.12)
    axis.invert_yaxis()
    axis.legend(loc="lower right", fontsize=8)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def timeline(events: Sequence[Event], title: str, path: Path) -> None:
    """Draw the last step of a run's `events`, stacked by category, with its phases marked.

    The x axis counts events, not seconds.
    """
    pyplot = matplotlib("a chart")
    before, step = last_step(events)
    live = dict.fromkeys(CATEGORIES, 0)
    for event in before:
        live[event.category] += event.bytes
    points: list[tuple[int, dict[str, int]]] = []
    for i, event in enumerate(step):
        live[event.category] += event.bytes
        # Local maxima are enough: no point between two of them is higher.
        if event.bytes > 0 and (i + 1 == len(step) or step[i + 1].bytes < 0):
            points.append((i, dict(live)))
    figure, axis = pyplot.subplots(figsize=(11, 5), constrained_layout=True)
    used = [name for name in CATEGORIES if any(now[name] for _, now in points)]
    colours = pyplot.get_cmap("tab20").colors
    stacks = [[now[name] / GB for _, now in points] for name in used]
    where = [i for i, _ in points]
    axis.stackplot(where, stacks, labels=used, step="post", colors=[colours[CATEGORIES.index(n)] for n in used])
    top = max(sum(now.values()) for _, now in points) / GB
    for i, event in enumerate(step):
        if i == 0 or event.phase != step[i - 1].phase:
            axis.axvline(i, color="black", linewidth=0.5)
            axis.annotate(event.phase, (i, top * 1.02), fontsize=8)
    axis.set(title=title, xlabel="allocations and frees", ylabel="GB requested", xlim=(0, len(step)))
    axis.set_ylim(0, top * 1.1)
    axis.legend(*reversed_legend(axis), loc="upper left", bbox_to_anchor=(1, 1), fontsize=8)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def history(points: Sequence[tuple[int, int]], title: str, path: Path) -> None:
    """Draw allocated and reserved bytes after each event of a recorded history; fragmentation is between the two."""
    pyplot = matplotlib("a chart")
    figure, axis = pyplot.subplots(figsize=(11, 5), constrained_layout=True)
    allocated, reserved = ([point[i] / GB for point in points] for i in range(2))
    where = range(len(points))
    axis.fill_between(where, allocated, step="post", color="tab:blue", label="allocated")
    axis.fill_between(where, allocated, reserved, step="post", color="tab:orange", alpha=0.5, label="fragmented")
    axis.plot(where, reserved, drawstyle="steps-post", color="tab:red", linewidth=1, label="reserved")
    axis.set(title=title, xlabel="events of the allocator", ylabel="GB", xlim=(0, len(points)), ylim=(0, None))
    axis.legend(loc="lower right", fontsize=8)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def last_step(events: Sequence[Event]) -> tuple[Sequence[Event], Sequence[Event]]:
    """The events before the last step, and those of that step: from its forward pass up to the next step's."""
    end = max((i for i, event in enumerate(events) if event.phase == "backward"), default=0)
    starts = [i for i in range(1, end) if events[i].phase == "forward" != events[i - 1].phase]
    start = starts[-1] if starts else 0
    stop = next((i for i in range(end, len(events)) if events[i].phase == "forward"), len(events))
    return events[:start], events[start:stop]


def reversed_legend(axis: Any) -> tuple[list, list]:
    """The handles and labels of the legend in the order of the stack, the uppermost first."""
    handles, labels = axis.get_legend_handles_labels()
    return handles[::-1], labels[::-1]


def readable(size: int) -> str:
    for unit, one in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if size >= one:
            return f"{size / one:.3g} {unit}"
    return f"{size} B"
