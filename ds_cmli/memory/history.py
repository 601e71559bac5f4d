"""A recorded history of CUDA's allocator, replayed through its model from the state that it began in.

What the beginning leaves open, the replay decides: where the model would use a free stretch that CUDA's allocator
passed over, the stretch is smaller, and the block before it has a larger rest.
"""

from dataclasses import dataclass, field
from typing import Any

from ds_cmli.memory.beginning import State, beginning, restore
from ds_cmli.memory.blocks import MIN_BLOCK
from ds_cmli.memory.expandable import ExpandableAllocator
from ds_cmli.memory.what_if import INVENTED

TAKEN = ("segment_alloc", "segment_map")
ROUNDS = 1000  # of replays, each with another rest


@dataclass
class Replayed:
    """One device's history. Bytes and numbers; "recorded" is what CUDA's allocator did, "replayed" the model."""

    device: int
    allocations: int = 0
    at_recorded_address: int = 0  # of these: the model chose the block that CUDA's allocator chose
    segments_recorded: list[int] = field(default_factory=list)  # bytes of each new one, in order
    segments_replayed: list[int] = field(default_factory=list)
    reserved_peak_recorded: int = 0
    reserved_peak_replayed: int = 0
    allocated_peak: int = 0
    ambiguous: int = 0  # blocks of the beginning whose rest no event tells
    unknown: int = 0  # frees of what the model does not hold
    out_of_memory: int = 0  # requests that were refused
    timeline: list[tuple[int, int]] = field(default_factory=list, repr=False)  # allocated, reserved after each event

    @property
    def exact(self) -> bool:
        return (
            self.at_recorded_address == self.allocations
            and self.segments_replayed == self.segments_recorded
            and self.reserved_peak_replayed == self.reserved_peak_recorded
            and not self.unknown
        )

    def to_dict(self) -> dict[str, int]:
        values = {key: value for key, value in vars(self).items() if key != "timeline"}
        return {**values, **{k: len(values[k]) for k in ("segments_recorded", "segments_replayed")}}


def replay_history(snapshot: dict[str, Any], device: int) -> Replayed:
    """Replay the requests of `device`. The model is told what it cannot know: the addresses that the device gave, when
    a block's last stream was done with it (`free_completed`), and which segments were given back.

    Raises:
        UserError: a history that the model's rules do not cover, or one that contradicts itself.
    """
    trace = snapshot["device_traces"][device]
    start = beginning(snapshot, device)
    for _ in range(ROUNDS):
        out, passed_over = _replay(trace, start, device)
        if passed_over is None:
            break
        block, rest = passed_over
        start.rests[block] = (rest, start.rests[block][1])
    out.ambiguous = sum(least < most for least, most in start.rests.values())
    return out


def _replay(trace: list[dict[str, Any]], start: State, device: int) -> tuple[Replayed, tuple[int, int] | None]:
    """The replay; or, at the first block that was not free as it is, the block before it and that one's least rest."""
    out = Replayed(device)
    allocator, blocks = restore(start)
    uncertain = {
        address: start.rounded(start.live[address]) for address, (low, high) in start.rests.items() if low < high
    }
    given: list[int] = []  # addresses of recorded segments that the model has not asked for yet
    sizes = {address: part.size for address, part in start.segments.items()}
    reserved = out.reserved_peak_recorded = out.reserved_peak_replayed = allocator.reserved
    out.allocated_peak = allocator.allocated
    for entry in trace:
        action, address, size = entry["action"], entry.get("addr", 0), entry.get("size", 0)
        if action in TAKEN:
            out.segments_recorded.append(size)
            given.append(address)
            sizes[address] = size
            reserved += size
            out.reserved_peak_recorded = max(out.reserved_peak_recorded, reserved)
        elif action == "alloc" and size:
            allocator.next_address = given[0] if given else INVENTED + (out.allocations << 42)
            allocator.actions.clear()
            block = allocator.malloc(size, entry.get("stream", 0), pool=start.pool(address))
            if block.address != address and block.before is not None:
                before = block.before.address
                if before in uncertain and blocks.get(before) is block.before:
                    whole = block.size + (block.after.size if block.after and block.after.free else 0)
                    rest = block.before.size - uncertain[before] + whole - start.rounded(size) + MIN_BLOCK
                    if rest <= start.rests[before][1]:
                        return out, (before, rest)
            out.segments_replayed += [done.bytes for done in allocator.actions if done.name in TAKEN]
            given.clear()  # one for each request: a segment that the model did not need is a difference, not a stock
            blocks[address] = block
            out.allocations += 1
            out.at_recorded_address += block.address == address
        elif action == "free_completed" and size:
            if address in blocks:
                allocator.free(blocks.pop(address))
                uncertain.pop(address, None)
            else:
                out.unknown += 1
        elif action == "segment_free":
            reserved -= sizes.pop(address, 0)
            segment = allocator.segments.get(address)
            if segment is not None and segment.free:
                allocator.release(segment)
            else:
                out.unknown += 1
        elif action == "segment_unmap":
            reserved -= size
            out.unknown += not (isinstance(allocator, ExpandableAllocator) and allocator.unmap_at(address, size))
        elif action == "oom":
            out.out_of_memory += 1
        out.reserved_peak_replayed = max(out.reserved_peak_replayed, allocator.reserved)
        out.allocated_peak = max(out.allocated_peak, allocator.allocated)
        out.timeline.append((allocator.allocated, allocator.reserved))
    return out, None
