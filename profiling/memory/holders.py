"""What holds the memory of a recorded history at one moment, by category or by line of code."""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from ds_cmli.allocator.beginning import LIVE
from ds_cmli.allocator.state import Record, Snapshot, State

BEFORE, NO_STACK = "from before the recording", "without a recorded stack"
LIBRARIES = ("/torch/", "/site-packages/", "/dist-packages/", "/lib/python", "<frozen ")
AUTOGRAD_NODES = (
    r"torch::autograd::generated::(\w+)::apply",
    r"torch::autograd::(AccumulateGrad)::apply",
)


@dataclass(frozen=True)
class Holder:
    name: str
    bytes: int  # rounded up as the allocator does
    blocks: int


def holders(
    snapshot: Snapshot, device: int, start: State, until: int | None = None
) -> list[Holder]:
    """The holders at the peak of the allocated bytes, or after the first `until` events.

    The largest comes first.
    """
    trace = snapshot["device_traces"][device]
    live = _live_before(snapshot, device, start)
    total = peak = sum(size for size, _ in live.values())
    at_peak = dict(live)
    # `live` is copied only at the end of each rise to a new peak, not after each allocation of it.
    growing = True
    for entry in trace[:until]:
        action, address, size = entry["action"], entry.get("addr", 0), entry.get("size", 0)
        if action == "alloc" and size:
            live[address] = start.rounded(size), _name(entry)
            total += live[address][0]
            if total > peak:
                peak, growing = total, True
        elif action == "free_completed" and address in live:
            if growing and total == peak:
                at_peak = dict(live)
            growing = False
            total -= live.pop(address)[0]
    if until is not None or (growing and total == peak):
        at_peak = live
    sizes: Counter[str] = Counter()
    blocks: Counter[str] = Counter()
    for size, name in at_peak.values():
        sizes[name] += size
        blocks[name] += 1
    return [Holder(name, size, blocks[name]) for name, size in sizes.most_common()]


def _live_before(snapshot: Snapshot, device: int, start: State) -> dict[int, tuple[int, str]]:
    """Address -> (bytes, name) of each block that was there before the history."""
    names = {}
    for address, block in _blocks(snapshot, device):
        if block["state"] in LIVE:
            names[address] = _name(block)
    for entry in snapshot["device_traces"][device]:
        if entry["action"] == "alloc":
            names.pop(entry.get("addr", 0), None)
    live = {}
    for address, requested in start.live.items():
        size = start.rounded(requested)
        live[address] = size, names.get(address) or f"blocks of {size:,} B {BEFORE}"
    return live


def _blocks(snapshot: Snapshot, device: int) -> Iterator[tuple[int, Record]]:
    for segment in snapshot["segments"]:
        if segment.get("device", 0) == device:
            address = segment["address"]
            for block in segment["blocks"]:
                yield address, block
                address += block["size"]


def _name(entry: Record) -> str:
    """The entry's category if it has one, or else the innermost line of a user in its stack."""
    category = entry.get("category")
    if isinstance(category, str):
        return category
    stack = entry.get("frames")
    frames = []
    if isinstance(stack, list):
        frames = [frame for frame in stack if isinstance(frame, dict)]
    if not frames:
        return f"blocks of {entry.get('size', 0):,} B {NO_STACK}"
    if frames[0].get("filename") == "predicted" and len(frames) > 1:
        return str(frames[1].get("name"))
    python = [frame for frame in frames if _file(frame).endswith(".py")]
    if not python:
        operator = _operator(frames)
        if operator:
            return operator
    users = (frame for frame in python if not _is_library(_file(frame)))
    frame = next(users, (python or frames)[0])
    file = "/".join(str(frame.get("filename", "?")).split("/")[-2:])
    return f"{file}:{frame.get('line', '?')} {frame.get('name', '')}".strip()


def _file(frame: Record) -> str:
    return str(frame.get("filename", ""))


def _is_library(file: str) -> bool:
    return any(part in file for part in LIBRARIES)


def _operator(frames: list[Record]) -> str:
    """What a stack without Python runs.

    That is a node of autograd, as in the threads of the backward pass, or an operator.
    """
    names = [str(frame.get("name", "")) for frame in frames]
    for pattern in AUTOGRAD_NODES:
        for name in names:
            match = re.search(pattern, name)
            if match:
                return f"backward pass: {match[1]}"
    for name in reversed(names):
        match = re.search(r"\bat::_ops::(\w+?)::", name)
        if match:
            return f"aten::{match[1]}"
    return ""
