"""Writes snapshots of CUDA's allocator, as `torch.cuda.memory._dump_snapshot` does.

Predicted allocations are written with the same schema, so that a prediction and a measurement open
in the same tools, such as PyTorch's memory viewer (pytorch.org/memory_viz).
"""

import pickle
from collections.abc import Iterable
from operator import attrgetter
from pathlib import Path
from typing import Any

from ds_cmli.memory_model.caching_allocator import Block, Event, Replay, Segment, replay

Record = dict[str, Any]


def write(events: Iterable[Event], path: str | Path) -> Replay:
    """Replay `events` in the model, and pickle its final state and history to `path`."""
    replayed = replay(events)
    Path(path).write_bytes(pickle.dumps(build(replayed)))
    return replayed


def build(replayed: Replay) -> Record:
    """The snapshot as `torch.cuda.memory._snapshot()` returns it.

    Every block and action carries its event's stack.
    """
    segments = sorted(replayed.segments, key=attrgetter("address"))
    trace = []
    for time, action in enumerate(replayed.actions):
        entry = {
            "action": action.name,
            "addr": action.address,
            "size": action.bytes,
            "stream": action.stream,
            "time_us": time,  # only the order of the events is known, not when they happen
            "frames": frames(action.event),
        }
        if action.event is not None:
            entry["category"] = action.event.category
        trace.append(entry)
    return {
        "segments": list(map(_segment, segments)),
        "device_traces": [trace],
        "allocator_settings": {},
        "external_annotations": [],
    }


def _segment(segment: Segment) -> Record:
    blocks = segment.blocks()
    in_use = sum(block.size for block in blocks if block.requested)
    return {
        "device": 0,
        "address": segment.address,
        "total_size": segment.size,
        "allocated_size": in_use,
        "active_size": in_use,
        "requested_size": sum(block.requested for block in blocks),
        "stream": segment.stream,
        "segment_type": "small" if segment.small else "large",
        "segment_pool_id": (0, 0),
        "is_expandable": False,
        "frames": frames(segment.event),
        "blocks": list(map(_block, blocks)),
    }


def _block(block: Block) -> Record:
    return {
        "address": block.address,
        "size": block.size,
        "requested_size": block.requested,
        "state": "active_allocated" if block.requested else "inactive",
        "frames": frames(block.event),
    }


def frames(event: Event | None) -> list[Record]:
    """A stack for the viewer, innermost frame first: operator, category, phase."""
    if event is None:
        return []
    names = [event.op or "allocation", event.category, event.phase]
    return [{"name": name, "filename": "predicted", "line": 0} for name in names]
