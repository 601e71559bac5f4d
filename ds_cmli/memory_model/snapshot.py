"""Writes predicted allocations as `torch.cuda.memory._dump_snapshot` writes those of a GPU, for
PyTorch's tools (pytorch.org/memory_viz). Each block and action has its event for a stack.
"""

import pickle
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ds_cmli.memory_model.caching_allocator import Block, Event, Segment, replay


def write(events: Iterable[Event], path: str | Path) -> None:
    """Replay `events`, and pickle the allocator's final state and history to `path`."""
    allocator = replay(events)
    trace = []
    for time, (name, address, size, stream, event) in enumerate(allocator.actions):
        entry = {"action": name, "addr": address, "size": size, "stream": stream}
        entry |= {"category": event.category} if event else {}
        # Only the order of the events is known, not when they happen.
        trace.append(entry | {"time_us": time, "frames": _stack(event)})
    segments = list(map(_segment, allocator.segments.values()))
    snapshot = {"segments": segments, "device_traces": [trace]}
    snapshot |= {"allocator_settings": {}, "external_annotations": []}
    Path(path).write_bytes(pickle.dumps(snapshot))


def _segment(segment: Segment) -> dict[str, Any]:
    in_use = sum(block.size for block in segment.blocks if block.requested)
    return {
        "device": 0,
        "address": segment.address,
        "total_size": segment.size,
        "allocated_size": in_use,
        "active_size": in_use,
        "requested_size": sum(block.requested for block in segment.blocks),
        "stream": segment.stream,
        "segment_type": "small" if segment.small else "large",
        "segment_pool_id": (0, 0),
        "is_expandable": False,
        "frames": _stack(segment.event),
        "blocks": list(map(_block, segment.blocks)),
    }


def _block(block: Block) -> dict[str, Any]:
    return {
        "address": block.address,
        "size": block.size,
        "requested_size": block.requested,
        "state": "active_allocated" if block.requested else "inactive",
        "frames": _stack(block.event),
    }


def _stack(event: Event | None) -> list[dict[str, Any]]:
    """Innermost frame first: operator, category, phase."""
    names = [event.op or "allocation", event.category, event.phase] if event else []
    return [{"name": name, "filename": "predicted", "line": 0} for name in names]
