"""Draws a program's memory over its steps: what is live by category, and what is reserved.

Shapes: C categories, E events, P events that are drawn.
"""

from itertools import pairwise

import numpy as np

from ds_cmli.allocator.allocator import replay
from ds_cmli.allocator.blocks import Event
from ds_cmli.common.plots import ACCENT, COLOURS, SOFT, matplotlib
from ds_cmli.fits.answer import Answer, Room
from ds_cmli.fits.steps import CATEGORIES

SIZE = (9, 4.5)  # inches
POINTS = 1500  # more cannot be distinguished


def draw(path: str, events: list[Event], answer: Answer, room: Room, title: str) -> None:
    """Write the picture, in the format that the path's ending names.

    Raises:
        UserError: matplotlib is missing.
    """
    pyplot = matplotlib("--plot")
    changes = np.zeros((len(CATEGORIES), len(events)), dtype=np.int64)  # [C, E]
    for number, event in enumerate(events):
        changes[CATEGORIES.index(event.category), number] = event.bytes
    live = changes.cumsum(1)  # [C, E]
    at = _drawn(live.sum(0))  # [P]
    for_tensors = room.bytes - (answer.totals["device"] - answer.totals["reserved"])
    replayed = replay(events, limit=for_tensors if answer.fits else None)
    reserved = np.array([size for *_, size in replayed.timeline])  # [E]
    figure, axis = pyplot.subplots(figsize=SIZE, layout="constrained")
    colours = COLOURS[: len(CATEGORIES)]
    axis.stackplot(at, live[:, at] / 1e9, labels=CATEGORIES, colors=colours, linewidth=0)
    axis.plot(at, reserved[at] / 1e9, color=SOFT, label="reserved", linewidth=1)
    if for_tensors < 2 * reserved.max():
        name = f"room for tensors on {room}"
        axis.axhline(for_tensors / 1e9, color=ACCENT, linestyle="--", label=name)
    _mark_phases(axis, events)
    axis.set(title=title, xlabel="allocations and frees, in their order", ylabel="GB")
    axis.margins(x=0)
    figure.legend(loc="outside right upper", frameon=False)
    figure.savefig(path)
    pyplot.close(figure)


def _drawn(total: np.ndarray) -> np.ndarray:
    """The events to draw, [P]: of each of as many parts of equal length the one with the most."""
    edges = np.linspace(0, len(total), min(POINTS, len(total)) + 1).astype(int)
    return np.array([begin + total[begin:end].argmax() for begin, end in pairwise(edges)])


def _mark_phases(axis, events: list[Event]) -> None:
    """Draw a line where backward passes and updates begin, and name them above."""
    before = ""
    for number, event in enumerate(events):
        if event.phase != before and event.phase in ("backward", "optimizer"):
            axis.axvline(number, color=SOFT, linewidth=0.6, linestyle=":")
            label = {"color": SOFT, "size": 7, "va": "top", "transform": axis.get_xaxis_transform()}
            axis.text(number, 0.99, f" {event.phase}", **label)
        before = event.phase
