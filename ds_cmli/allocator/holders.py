"""What holds the memory of a recorded history at one moment, by category or by the line of code that allocated it."""

import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

from ds_cmli.allocator.beginning import LIVE
from ds_cmli.allocator.state import State

BEFORE, NO_STACK = "from before the recording", "without a recorded stack"
LIBRARIES = ("/torch/", "/site-packages/", "/dist-packages/", "/lib/python", "<frozen ")


@dataclass(frozen=True)
class Holder:
    name: str
    bytes: int  # rounded up as the allocator does
    blocks: int


def holders(
    snapshot: dict[str, Any], device: int, start: State, until: int | None = None
) -> list[Holder]:
    """The holders at the peak of the allocated bytes, or after the first `until` events; the largest comes first."""
    trace = snapshot["device_traces"][device]
    names = {
        block_address: _name(block)
        for segment in snapshot["segments"]
        for block_address, block in _blocks(segment)
        if segment.get("device", 0) == device and block["state"] in LIVE
    }
    allocated_in_trace = {entry.get("addr", 0) for entry in trace if entry["action"] == "alloc"}
    live = {
        address: (
            start.rounded(size),
            names.get(address, "") if address not in allocated_in_trace else "",
        )
        for address, size in start.live.items()
    }
    live = {
        address: (size, name or f"blocks of {size:,} B {BEFORE}")
        for address, (size, name) in live.items()
    }
    total = peak = sum(size for size, _ in live.values())
    at_peak = dict(live) if until is None else live
    growing = True  # `live` is copied only at the end of each rise to a new peak, not after each allocation of the rise
    for entry in trace[:until]:
        action, address, size = entry["action"], entry.get("addr", 0), entry.get("size", 0)
        if action == "alloc" and size:
            live[address] = start.rounded(size), _name(entry)
            total += live[address][0]
            if until is None and total > peak:
                peak, growing = total, True
        elif action == "free_completed" and address in live:
            if until is None and growing and total == peak:
                at_peak = dict(live)
            growing = False
            total -= live.pop(address)[0]
    if until is None and growing and total == peak:
        at_peak = dict(live)
    sizes: Counter[str] = Counter()
    blocks: Counter[str] = Counter()
    for size, name in at_peak.values():
        sizes[name] += size
        blocks[name] += 1
    return [Holder(name, size, blocks[name]) for name, size in sizes.most_common()]


def _blocks(segment: dict[str, Any]) -> Any:
    address = segment["address"]
    for block in segment["blocks"]:
        yield address, block
        address += block["size"]


def _operator(frames: list[dict[str, Any]]) -> str:
    """What a stack without Python runs: a node of autograd, as in the threads of the backward pass, or an operator."""
    names = [str(frame.get("name", "")) for frame in frames]
    for pattern in (
        r"torch::autograd::generated::(\w+)::apply",
        r"torch::autograd::(AccumulateGrad)::apply",
    ):
        found = next(filter(None, (re.search(pattern, name) for name in names)), None)
        if found:
            return f"backward pass: {found[1]}"
    operators = [
        found[1] for found in (re.search(r"\bat::_ops::(\w+?)::", name) for name in names) if found
    ]
    return f"aten::{operators[-1]}" if operators else ""


def _name(entry: dict[str, Any]) -> str:
    """The entry's category if it has one, otherwise the innermost line of its stack that is not in a library."""
    category = entry.get("category")
    if isinstance(category, str):
        return category
    stack = entry.get("frames")
    frames = [f for f in stack if isinstance(f, dict)] if isinstance(stack, list) else []
    if not frames:
        return f"blocks of {entry.get('size', 0):,} B {NO_STACK}"
    if frames[0].get("filename") == "predicted" and len(frames) > 1:
        return str(frames[1].get("name"))
    python = [frame for frame in frames if str(frame.get("filename", "")).endswith(".py")]
    users = [f for f in python if not any(part in str(f["filename"]) for part in LIBRARIES)]
    operator = "" if python else _operator(frames)
    if operator:
        return operator
    frame = (users or python or frames)[0]
    file = "/".join(str(frame.get("filename", "?")).split("/")[-2:])
    return f"{file}:{frame.get('line', '?')} {frame.get('name', '')}".strip()
