"""Writes predicted allocations as a snapshot of CUDA's allocator, for PyTorch's memory viewer (pytorch.org/memory_viz).

The schema is that of `torch.cuda.memory._snapshot()`, so that a prediction and a measurement open in the same tools.
"""

import itertools
import pickle
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ds_cmli.allocator.allocator import Replay, replay
from ds_cmli.allocator.blocks import Block, Event, Segment


def write(events: Iterable[Event], path: str | Path) -> Replay:
    """Replay `events` in the allocator's model, and pickle a snapshot of its final state and history to `path`."""
    replayed = replay(events)
    Path(path).write_bytes(pickle.dumps(build(replayed)))
    return replayed


def build(replayed: Replay) -> dict[str, Any]:
    """The snapshot as `torch.cuda.memory._snapshot()` returns it. Every block and action carries its event's stack."""
    segments = []
    stretches = [stretch for segment in replayed.segments for stretch in _mapped(segment)]
    for blocks in sorted(stretches, key=lambda stretch: stretch[0].address):
        segment = blocks[0].segment
        in_use = sum(block.size for block in blocks if block.requested)
        segments.append(
            {
                "device": 0,
                "address": blocks[0].address,
                "total_size": sum(block.size for block in blocks),
                "allocated_size": in_use,
                "active_size": in_use,
                "requested_size": sum(block.requested for block in blocks),
                "stream": segment.stream,
                "segment_type": "small" if segment.small else "large",
                "segment_pool_id": segment.pool,
                "is_expandable": sum(block.size for block in blocks) < segment.size,
                "frames": frames(segment.event),
                "blocks": [_block(block) for block in blocks],
            }
        )
    trace = [
        {
            "action": action.name,
            "addr": action.address,
            "size": action.bytes,
            "stream": action.stream,
            "time_us": time,  # only the order of the events is known, not when they happen
            "frames": frames(action.event),
            **({"category": action.event.category} if action.event else {}),
        }
        for time, action in enumerate(replayed.actions)
    ]
    return {
        "segments": segments,
        "device_traces": [trace],
        "allocator_settings": {},
        "external_annotations": [],
    }


def _mapped(segment: Segment) -> list[list[Block]]:
    """The blocks of each stretch that has memory mapped: all of an ordinary segment, parts of an expandable one."""
    groups = itertools.groupby(segment.blocks(), key=lambda block: block.mapped)
    return [list(blocks) for mapped, blocks in groups if mapped]


def frames(event: Event | None) -> list[dict[str, Any]]:
    """A stack for the viewer, innermost frame first: operator, category, phase."""
    if event is None:
        return []
    names = [event.op or "allocation", event.category, event.phase]
    return [{"name": name, "filename": "predicted", "line": 0} for name in names]


def _block(block: Block) -> dict[str, Any]:
    return {
        "address": block.address,
        "size": block.size,
        "requested_size": block.requested,
        "state": "active_allocated" if block.requested else "inactive",
        "frames": frames(block.event),
    }
