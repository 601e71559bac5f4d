"""The comparison as pictures: a bar for each figure, and a training step's memory over time. Needs matplotlib."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ds_cmli.memory.compare import GB, Row
from ds_cmli.memory.report import CATEGORIES


def matplotlib() -> Any:
    """pyplot, drawing to files; raises ImportError where matplotlib is not installed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def bars(rows: Sequence[Row], path: Path) -> None:
    """Document, true and measured bytes of each row, on a logarithmic axis."""
    pyplot = matplotlib()
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


def timeline(report: Any, title: str, path: Path) -> None:
    """The last step of a `Report`, stacked by category, its phases marked; over allocations and frees, not seconds."""
    pyplot = matplotlib()
    last = last_step(report.timeline)
    # Some thousand points at the most, and the peak among them.
    every = max(1, len(last) // 3000)
    highest = max(range(len(last)), key=lambda i: sum(last[i][1].values()))
    points = sorted({*range(0, len(last), every), highest})
    figure, axis = pyplot.subplots(figsize=(11, 5), constrained_layout=True)
    used = [name for name in CATEGORIES if any(last[i][1][name] for i in points)]
    colours = pyplot.get_cmap("tab20").colors
    stacks = [[last[i][1][name] / GB for i in points] for name in used]
    axis.stackplot(points, stacks, labels=used, step="post", colors=[colours[CATEGORIES.index(n)] for n in used])
    begins = [i for i in range(len(last)) if i == 0 or last[i][0] != last[i - 1][0]]
    top = sum(last[highest][1].values()) / GB
    for i in begins:
        axis.axvline(i, color="black", linewidth=0.5)
        axis.annotate(last[i][0], (i, top * 1.02), fontsize=8)
    axis.set(title=title, xlabel="allocations and frees", ylabel="GB requested", ylim=(0, top * 1.1))
    axis.legend(*reversed_legend(axis), loc="upper left", bbox_to_anchor=(1, 1), fontsize=8)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def last_step(timeline: list[tuple[str, dict[str, int]]]) -> list[tuple[str, dict[str, int]]]:
    """From where the last forward pass begins."""
    end = max((i for i, (phase, _) in enumerate(timeline) if phase == "backward"), default=0)
    starts = [i for i in range(1, end) if timeline[i][0] == "forward" and timeline[i - 1][0] != "forward"]
    stop = next((i for i in range(end, len(timeline)) if timeline[i][0] == "forward"), len(timeline))
    return timeline[starts[-1] if starts else 0 : stop]


def reversed_legend(axis: Any) -> tuple[list, list]:
    """In the order of the stack, the uppermost first."""
    handles, labels = axis.get_legend_handles_labels()
    return handles[::-1], labels[::-1]


def readable(size: int) -> str:
    for unit, one in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if size >= one:
            return f"{size / one:.3g} {unit}"
    return f"{size} B"
