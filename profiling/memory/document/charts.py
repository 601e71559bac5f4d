"""A picture of a step's memory over time. It needs matplotlib."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ds_cmli.common import plots
from ds_cmli.memory.report import CATEGORIES, COLOURS
from ds_cmli.memory_model.caching_allocator import Event
from profiling.memory.document.compare import GB
from profiling.scripts import NARROW, picture, plain, readable, written

ROWS = 5  # of categories in a column below the stack
CMLI = "CMLI op"  # of `CATEGORIES`


def timeline(events: Sequence[Event], title: str, path: Path) -> None:
    """Draw the last step of a run's `events`, stacked by category, with its phases marked.

    The x axis counts events, not seconds. The title says what the all-pairs loss needs at the peak,
    or what holds most there; below the stack stand the categories in its order, with their sizes
    there. `what`: of which step this is.
    """
    before, step = last_step(events)
    points = maxima(before, step)
    peak_at, peak = max(points, key=lambda point: sum(point[1].values()))
    total, largest = sum(peak.values()), max(peak, key=peak.__getitem__)
    used = [name for name in CATEGORIES if any(now[name] for _, now in points)]
    figure, (axis, below) = picture(5.2, rows=2, width=NARROW, height_ratios=(3, 1))
    stacks = [[now[name] / GB for _, now in points] for name in used]
    where = [i for i, _ in points]
    axis.stackplot(where, stacks, step="post", colors=[COLOURS[name] for name in used])
    top = total / GB
    starts = [i for i in range(len(step)) if i == 0 or step[i].phase != step[i - 1].phase]
    for start, end in zip(starts, [*starts[1:], len(step)], strict=True):
        if start:
            axis.axvline(start, color=plots.SOFT, linewidth=0.7)
        if end - start > len(step) / 20:
            place = ((start + end) / 2, top * 1.07)
            axis.text(*place, step[start].phase, ha="center", size=8.5, color=plots.SOFT)
    axis.plot(peak_at, top * 1.02, "v", color=plots.SOFT, markersize=5)
    axis.set(xlim=(0, len(step)), ylim=(0, top * 1.14), xlabel="allocations and frees")
    axis.yaxis.set_major_formatter(lambda size, _: f"{size:g} GB")
    axis.xaxis.set_major_formatter(plain)
    list_below(below, {name: peak[name] for name in used[::-1] if peak[name]})
    finding = f"{largest[0].upper()}{largest[1:]}: {peak[largest] / total:.0%} of the {readable(total)} at the peak"
    if peak[CMLI]:
        finding = f"The CMLI loss needs {readable(peak[CMLI])} of {readable(total)}"
    written(figure, path, finding, title)


def list_below(axis: Any, peak: dict[str, int]) -> None:
    """Each category with its colour, in the order of the stack, and its size at the peak."""
    axis.axis("off")
    axis.set(xlim=(0, 2.1), ylim=(0, ROWS + 1))
    axis.text(0, ROWS + 0.5, "▼ at the peak", size=8.5, va="center", color=plots.SOFT)
    for number, (name, size) in enumerate(peak.items()):
        left, line = 1.1 * (number // ROWS), ROWS - 0.5 - number % ROWS
        axis.text(left, line, "■", color=COLOURS[name], size=13, va="center")
        axis.text(left + 0.09, line, name, size=9, va="center")
        axis.text(left + 1, line, readable(size), size=9, va="center", ha="right")


def maxima(before: Sequence[Event], step: Sequence[Event]) -> list[tuple[int, dict[str, int]]]:
    """The local maxima of a step: the numbers of their events, and the live bytes by category."""
    live = dict.fromkeys(CATEGORIES, 0)
    for event in before:
        live[event.category] += event.bytes
    points: list[tuple[int, dict[str, int]]] = []
    for i, event in enumerate(step):
        live[event.category] += event.bytes
        if event.bytes > 0 and (i + 1 == len(step) or step[i + 1].bytes < 0):
            points.append((i, dict(live)))
    return points


def last_step(events: Sequence[Event]) -> tuple[Sequence[Event], Sequence[Event]]:
    """The events before the last step, and those from its forward pass up to the next step's."""
    end = max((i for i, event in enumerate(events) if event.phase == "backward"), default=0)
    starts = [i for i in range(1, end) if events[i].phase == "forward" != events[i - 1].phase]
    start = starts[-1] if starts else 0
    stop = next((i for i in range(end, len(events)) if events[i].phase == "forward"), len(events))
    return events[:start], events[start:stop]
