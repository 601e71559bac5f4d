"""What prediction and measurement both give: allocation events, and a report of them in the same names.

All sizes are bytes. "Requested" is what the program asked for; "allocated" what the caching allocator handed out for it
(rounded up); "reserved" what the allocator took from the device; "device" what the process occupies on it in all.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

CATEGORIES = (
    "parameters",
    "gradients",
    "optimizer states",
    "master weights",  # ZeRO's fp32 copy of its share of the parameters
    "ZeRO buckets",
    "teacher",
    "activations student",
    "activations teacher",
    "CMLI op",  # saved argmax, scores and scratch of the all-pairs op
    "exchanged text",  # the other ranks' text features, and the gradient that returns to them
    "data",
    "temporaries",
)
PHASES = ("init", "forward", "loss", "backward", "optimizer")


@dataclass(frozen=True)
class Event:
    """One allocation, or its end, in the order in which they happened."""

    block: int  # the same number at an allocation and at its end; not used again
    bytes: int  # requested: positive at an allocation, the same number negative at its end
    category: str  # one of CATEGORIES
    phase: str  # one of PHASES
    op: str = ""  # the operator that asked for it


@dataclass
class Report:
    setting: dict[str, Any]  # preset, world size, batch and so on, for whoever reads the report later
    source: str  # "predicted", "measured: CPU allocator", "measured: NVIDIA A10G", ...
    categories: dict[str, int]  # live at the moment of the requested peak; they add up to totals["requested"]
    phases: dict[str, int]  # the requested peak of each phase
    totals: dict[str, int]  # peaks: requested, and where known allocated, reserved, device
    timeline: list[tuple[str, dict[str, int]]] = field(default_factory=list)  # (phase, live bytes by category)

    def to_dict(self) -> dict[str, Any]:
        return {
            "setting": self.setting,
            "source": self.source,
            "categories": self.categories,
            "phases": self.phases,
            "totals": self.totals,
        }


def summarise(events: Iterable[Event], setting: dict[str, Any], source: str) -> Report:
    """Replay `events` into a report: live bytes by category at the peak, and the peak of each phase."""
    live = dict.fromkeys(CATEGORIES, 0)
    phases = dict.fromkeys(PHASES, 0)
    total, peak, at_peak = 0, -1, dict(live)
    timeline = []
    for event in events:
        live[event.category] += event.bytes
        total += event.bytes
        phases[event.phase] = max(phases[event.phase], total)
        timeline.append((event.phase, dict(live)))
        if total > peak:
            peak, at_peak = total, dict(live)
    return Report(setting, source, at_peak, phases, {"requested": max(peak, 0)}, timeline)
