"""A recorded history of CUDA's allocator, replayed through its model from the state that it began in.

A recording begins anywhere: switched on late, or in a ring buffer that lost its first events. What lived then follows
from the segments at the end, walking back. Only one thing does not: where a block of the large pool is followed by a
stretch that is free, up to 1 MiB of it may be the block's own, as a rest that was too small to be split off. Later
events tell: what is allocated behind the block begins where it ends; and where the model would use a free stretch that
CUDA's allocator passed over, the stretch is smaller.
"""

from bisect import bisect_left, insort
from dataclasses import dataclass, field
from typing import Any

from ds_cmli.common.errors import UserError
from ds_cmli.memory.allocator import (
    DEFAULT_POOL,
    MIN_BLOCK,
    SMALL_REQUEST,
    SMALL_SEGMENT,
    Block,
    CachingAllocator,
    Pool,
    Segment,
    rounded,
)

INVENTED = 1 << 62  # addresses of segments that the model takes and the recording does not have
LIVE = ("active_allocated", "active_pending_free", "active_awaiting_free")
ACTIONS = ("alloc", "free_requested", "free_completed", "segment_alloc", "segment_free", "snapshot", "oom",
           "user_defined")  # fmt: skip
ROUNDS = 1000  # of replays, each with another rest


@dataclass
class State:
    """The allocator at one moment."""

    segments: dict[int, tuple[int, int, Pool]] = field(default_factory=dict)  # address -> (bytes, stream, pool)
    live: dict[int, int] = field(default_factory=dict)  # address of each block in use -> requested bytes
    sizes: dict[int, int] = field(default_factory=dict)  # of these, the blocks' bytes where they are known
    rests: dict[int, tuple[int, int]] = field(default_factory=dict)  # block -> (least, most) bytes of its rest
    private: list[tuple[int, int, Pool]] = field(default_factory=list)  # (begin, end, pool) of others' segments

    def pool(self, address: int) -> Pool:
        return next((pool for begin, end, pool in self.private if begin <= address < end), DEFAULT_POOL)


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

    @property
    def exact(self) -> bool:
        return (
            self.at_recorded_address == self.allocations
            and self.segments_replayed == self.segments_recorded
            and self.reserved_peak_replayed == self.reserved_peak_recorded
            and not self.unknown
        )

    def to_dict(self) -> dict[str, int]:
        values = vars(self)
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


def beginning(snapshot: dict[str, Any], device: int) -> State:
    """The state before the first event."""
    trace = snapshot["device_traces"][device]
    _check_rules(snapshot, device)
    out = State()
    for segment in snapshot["segments"]:
        if segment.get("device", 0) != device:
            continue
        address, pool = segment["address"], tuple(segment.get("segment_pool_id", DEFAULT_POOL))
        out.segments[address] = segment["total_size"], segment["stream"], pool
        if pool != DEFAULT_POOL:
            out.private.append((address, address + segment["total_size"], pool))
        for block in segment["blocks"]:
            if block["state"] in LIVE:
                out.live[address] = block.get("requested_size", block["size"])
                out.sizes[address] = block["size"]
            address += block["size"]
    for number in range(len(trace) - 1, -1, -1):
        action, address, size = trace[number]["action"], trace[number].get("addr", 0), trace[number].get("size", 0)
        known = True
        if action == "alloc" and size:
            known = out.live.pop(address, None) is not None
            out.sizes.pop(address, None)
        elif action == "free_completed" and size:
            known = address not in out.live
            out.live[address] = size
        elif action == "segment_alloc":
            known = out.segments.pop(address, None) is not None
        elif action == "segment_free":
            out.segments[address] = size, trace[number].get("stream", 0), DEFAULT_POOL
        if not known:
            raise UserError(
                f"device {device}: event {number} ({action} of {size:,} B at {address:#x}) contradicts what came after:"
                " the snapshot's segments and its history do not belong together"
            )
    _bound_rests(out, trace, device)
    return out


def _check_rules(snapshot: dict[str, Any], device: int) -> None:
    """Whether the history follows the rules of the model."""
    actions = {entry["action"] for entry in snapshot["device_traces"][device]}
    settings = snapshot.get("allocator_settings")
    settings = settings if isinstance(settings, dict) else {}
    divisions = settings.get("roundup_power2_divisions")
    with_settings = {
        "expandable segments": actions & {"segment_map", "segment_unmap"}
        or any(s.get("is_expandable") for s in snapshot["segments"] if s.get("device", 0) == device),
        "max_split_size_mb": settings.get("max_split_size", -1) not in (-1, 2**64 - 1),
        "roundup_power2_divisions": any(
            number not in (None, 0, 1)
            for number in (divisions.values() if isinstance(divisions, dict) else [divisions])
        ),
    }
    for name, found in with_settings.items():
        if found:
            raise UserError(f"device {device} was recorded with {name}, which the replay does not follow")
    if actions - set(ACTIONS):
        raise UserError(
            f"device {device} has events {sorted(actions - set(ACTIONS))!r}, which the replay does not know"
        )


def _bound_rests(state: State, trace: list[dict[str, Any]], device: int) -> None:
    """Fill `state.rests` with what the gaps behind blocks and the first allocation in each of them tell."""
    order = sorted(state.live)
    ends = sorted((address + size, address) for address, (size, _, _) in state.segments.items())
    open_gaps: dict[int, tuple[int, int, int]] = {}
    for position, address in enumerate(order):
        at = bisect_left(ends, (address + 1, 0))
        if at == len(ends) or address < ends[at][1]:
            raise UserError(f"device {device}: the block at {address:#x} lies in no segment: the history is incomplete")
        end, segment = ends[at]
        behind = min(order[position + 1], end) if position + 1 < len(order) else end
        used = address + rounded(state.live[address])
        gap = behind - used
        if gap < 0:
            raise UserError(f"device {device}: the block at {address:#x} reaches into the next: the history is damaged")
        if address in state.sizes:
            rest = state.sizes[address] - rounded(state.live[address])
            state.rests[address] = rest, rest
        elif state.segments[segment][0] == SMALL_SEGMENT:
            state.rests[address] = 0, 0
        elif gap <= SMALL_REQUEST:
            state.rests[address] = gap, gap
        else:  # a free block of the large pool has more than 1 MiB
            most = min(SMALL_REQUEST, gap - SMALL_REQUEST - MIN_BLOCK)
            open_gaps[address] = used, most, end
            state.rests[address] = 0, most
    for entry in trace:
        address = entry.get("addr", 0)
        if entry["action"] == "alloc" and entry.get("size"):
            position = bisect_left(order, address)
            before = order[position - 1] if position else -1
            if before in open_gaps and address < open_gaps[before][2]:
                used, most, _ = open_gaps.pop(before)
                if 0 <= address - used <= most:
                    state.rests[before] = address - used, address - used
            insort(order, address)
        elif entry["action"] == "free_completed" and entry.get("size"):
            position = bisect_left(order, address)
            if position < len(order) and order[position] == address:
                order.pop(position)
            open_gaps.pop(address, None)


def restore(state: State) -> tuple[CachingAllocator, dict[int, Block]]:
    """The model in that state, and its blocks in use by address."""
    allocator, blocks = CachingAllocator(), {}
    live = sorted(state.live)
    for address, (size, stream, pool) in state.segments.items():
        segment = Segment(address, size, stream, size == SMALL_SEGMENT, pool)
        allocator.segments[address] = segment
        allocator.reserved += size
        inside = live[bisect_left(live, address) : bisect_left(live, address + size)]
        last, position = None, address
        for start in [*inside, address + size]:
            pieces = [(position, start - position, 0)] if start > position else []
            if start < address + size:
                requested = state.live[start]
                pieces.append((start, rounded(requested) + state.rests[start][0], requested))
            for begin, length, requested in pieces:
                block = segment.first if last is None else Block(segment, begin, length, before=last)
                block.size, block.requested = length, requested
                if last is not None:
                    last.after = block
                last = block
                if requested:
                    blocks[begin] = block
                    allocator.requested += requested
                    allocator.allocated += length
                else:
                    allocator.keep(block)
            position = begin + length
    return allocator, blocks


def _replay(trace: list[dict[str, Any]], start: State, device: int) -> tuple[Replayed, tuple[int, int] | None]:
    """The replay; or, at the first block that was not free as it is, the block before it and that one's least rest."""
    out = Replayed(device)
    allocator, blocks = restore(start)
    own = {address: rounded(start.live[address]) for address, (least, most) in start.rests.items() if least < most}
    given: list[int] = []  # addresses of recorded segments that the model has not asked for yet
    sizes = {address: size for address, (size, _, _) in start.segments.items()}
    reserved = out.reserved_peak_recorded = out.reserved_peak_replayed = allocator.reserved
    out.allocated_peak = allocator.allocated
    for entry in trace:
        action, address, size = entry["action"], entry.get("addr", 0), entry.get("size", 0)
        if action == "segment_alloc":
            out.segments_recorded.append(size)
            given.append(address)
            sizes[address] = size
            reserved += size
            out.reserved_peak_recorded = max(out.reserved_peak_recorded, reserved)
        elif action == "alloc" and size:
            allocator.next_address = given.pop(0) if given else INVENTED + (out.allocations << 40)
            known = len(allocator.segments)
            block = allocator.malloc(size, entry.get("stream", 0), pool=start.pool(address))
            if block.address != address and block.before is not None:
                before = block.before.address
                if before in own and blocks.get(before) is block.before:
                    whole = block.size + (block.after.size if block.after and not block.after.requested else 0)
                    rest = block.before.size - own[before] + whole - rounded(size) + MIN_BLOCK
                    if rest <= start.rests[before][1]:
                        return out, (before, rest)
            if len(allocator.segments) > known:
                out.segments_replayed.append(block.segment.size)
            given.clear()  # one for each request: a segment that the model did not need is a difference, not a stock
            blocks[address] = block
            out.allocations += 1
            out.at_recorded_address += block.address == address
        elif action == "free_completed" and size:
            if address in blocks:
                allocator.free(blocks.pop(address))
                own.pop(address, None)
            else:
                out.unknown += 1
        elif action == "segment_free":
            reserved -= sizes.pop(address, 0)
            segment = allocator.segments.get(address)
            if segment is not None and not segment.first.requested and segment.first.after is None:
                allocator.release(segment)
            else:
                out.unknown += 1
        elif action == "oom":
            out.out_of_memory += 1
        out.reserved_peak_replayed = max(out.reserved_peak_replayed, allocator.reserved)
        out.allocated_peak = max(out.allocated_peak, allocator.allocated)
    return out, None
