"""Replays a recorded history of CUDA's allocator through its model, from the state in which the history began.

The replay decides what `beginning` leaves open. If the model would use a free block that CUDA's allocator passed over,
that free block was really smaller, so the block before it has a larger rest; or it belonged to another pool.
"""

from dataclasses import dataclass, field
from typing import Any

from ds_cmli.allocator.allocator import CachingAllocator
from ds_cmli.allocator.beginning import beginning
from ds_cmli.allocator.blocks import DEFAULT_POOL, MIN_BLOCK, segment_bytes
from ds_cmli.allocator.expandable import ExpandableAllocator
from ds_cmli.allocator.pools import Recorded, told_apart
from ds_cmli.allocator.state import State, restore
from ds_cmli.allocator.what_if import INVENTED

TAKEN = ("segment_alloc", "segment_map")
ROUNDS = 1000  # limit for the number of replays; each one corrects one rest


@dataclass
class Replayed:
    """The replay of one device's history. "recorded" is what CUDA's allocator did, "replayed" what the model did."""

    device: int
    allocations: int = 0
    at_recorded_address: int = (
        0  # number of allocations for which the model chose the same block as CUDA's allocator
    )
    segments_recorded: list[int] = field(
        default_factory=list
    )  # bytes of each new segment, in order
    segments_replayed: list[int] = field(default_factory=list)
    reserved_peak_recorded: int = 0
    reserved_peak_replayed: int = 0
    allocated_peak: int = 0
    ambiguous: int = 0  # blocks from before the history whose rest remains unknown
    unknown: int = 0  # frees of blocks or segments that the model could not repeat
    out_of_memory: int = 0  # requests that were refused
    released_private: int = (
        0  # released segments whose pool is not recorded, and of which the requests tell: private
    )
    released_unknown: int = (
        0  # released segments of which neither tells the pool, in a history with private pools
    )
    timeline: list[tuple[int, int]] = field(
        default_factory=list, repr=False
    )  # (allocated, reserved) after each event
    start: State = field(default_factory=State, repr=False)  # the state at the first event

    @property
    def exact(self) -> bool:
        return (
            self.at_recorded_address == self.allocations
            and self.segments_replayed == self.segments_recorded
            and self.reserved_peak_replayed == self.reserved_peak_recorded
            and not self.unknown
        )

    def to_dict(self) -> dict[str, int]:
        values = {
            key: value for key, value in vars(self).items() if key not in ("timeline", "start")
        }
        return {**values, **{k: len(values[k]) for k in ("segments_recorded", "segments_replayed")}}


def replay_history(snapshot: dict[str, Any], device: int) -> Replayed:
    """Replay the requests of `device`. The history supplies what the model cannot know: the addresses of new segments,
    when the last stream was done with a freed block (`free_completed`), and which segments were returned.

    Raises:
        UserError: the model's rules do not cover the history, or it contradicts itself.
    """
    trace = snapshot["device_traces"][device]
    start = beginning(snapshot, device)
    out = _with_rests(trace, start, device)
    for uncertain in (
        (False, True) if start.untold and not start.settings.expandable_segments else ()
    ):
        if out.exact:
            break
        start = beginning(snapshot, device)
        guess = _with_rests(trace, start.with_pools(*told_apart(start, trace, uncertain)), device)
        if guess.at_recorded_address > out.at_recorded_address:
            out = guess
    pools = {*out.start.untold.values(), *(part.pool for part in out.start.parts())}
    told = out.start.private if out.exact or out.start.settings.expandable_segments else set()
    out.released_private = len(told)
    if pools - {DEFAULT_POOL}:
        out.released_unknown = len(out.start.untold.keys() - told)
    return out


def _with_rests(trace: list[dict[str, Any]], start: State, device: int) -> Replayed:
    for _ in range(ROUNDS):
        out, passed_over = _replay(trace, start, device)
        if passed_over is None:
            break
        block, rest = passed_over
        start.rests[block] = (rest, start.rests[block][1])
    out.ambiguous = sum(least < most for least, most in start.rests.values())
    return out


def _replay(
    trace: list[dict[str, Any]], start: State, device: int
) -> tuple[Replayed, tuple[int, int] | None]:
    """Replay once. If the model chooses a free block that CUDA's allocator passed over, and the rest of the block in
    front of it is uncertain, this stops and also returns that block's address and the least rest that explains the
    difference. Otherwise None stands in their place.
    """
    out = Replayed(device, start=start)
    recorded, expandable = Recorded(start), start.settings.expandable_segments
    allocator, blocks = restore(start)
    uncertain = {
        address: start.rounded(start.live[address])
        for address, (low, high) in start.rests.items()
        if low < high
    }
    given: list[int] = []  # addresses of recorded segments that the model has not asked for yet
    reserved = out.reserved_peak_recorded = out.reserved_peak_replayed = allocator.reserved
    out.allocated_peak = allocator.allocated
    for number, entry in enumerate(trace):
        action, address, size = entry["action"], entry.get("addr", 0), entry.get("size", 0)
        if action in TAKEN:
            out.segments_recorded.append(size)
            given.append(address)
            reserved += size
            out.reserved_peak_recorded = max(out.reserved_peak_recorded, reserved)
        elif action == "alloc" and size:
            allocator.next_address = INVENTED + (out.allocations << 42)
            mine = (
                given[:1]
                if expandable
                else [new for new in given if new == recorded.segment(address)]
            )
            if mine and _is_vacant(allocator, mine[0], segment_bytes(start.rounded(size))):
                allocator.next_address = mine[0]
            allocator.actions.clear()
            block = allocator.malloc(size, entry.get("stream", 0), pool=recorded.pool(entry))
            if block.address != address and block.before is not None:
                before = block.before.address
                if before in uncertain and blocks.get(before) is block.before:
                    whole = block.size + (
                        block.after.size if block.after and block.after.free else 0
                    )
                    rest = (
                        block.before.size
                        - uncertain[before]
                        + whole
                        - start.rounded(size)
                        + MIN_BLOCK
                    )
                    if rest <= start.rests[before][1]:
                        return out, (before, rest)
            out.segments_replayed += [
                done.bytes for done in allocator.actions if done.name in TAKEN
            ]
            # A segment serves the request at its address: if the model did not need it, it is not kept for later. Other
            # new segments are those of other threads' requests.
            given = [] if expandable else [new for new in given if new not in mine]
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
            reserved -= size
            segment = allocator.segments.get(address)
            if segment is not None and segment.free:
                allocator.release(segment)
            else:
                out.unknown += 1
        elif action == "segment_unmap":
            reserved -= size
            out.unknown += not (
                isinstance(allocator, ExpandableAllocator) and allocator.unmap_at(address, size)
            )
        elif action == "oom":
            out.out_of_memory += 1
        recorded.follow(number, entry)
        out.reserved_peak_replayed = max(out.reserved_peak_replayed, allocator.reserved)
        out.allocated_peak = max(out.allocated_peak, allocator.allocated)
        out.timeline.append((allocator.allocated, allocator.reserved))
    return out, None


def _is_vacant(allocator: CachingAllocator, address: int, size: int) -> bool:
    """Whether the model has nothing where a new segment begins. It may have kept what CUDA's allocator returned."""
    for held in allocator.segments.values():
        end = (
            held.blocks()[-1].address + 1
            if isinstance(allocator, ExpandableAllocator)
            else held.address + held.size
        )
        if held.address < address + size and address < end:
            return False
    return True
