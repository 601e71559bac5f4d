"""Replays a recorded history of CUDA's allocator through its model, from its beginning.

The replay decides what `beginning` leaves open. If the model would use a free block that CUDA's
allocator skipped, that free block was really smaller, so the block before it has a larger
remainder; or it belonged to another pool. If both blocks are equal, its segment was taken later.
"""

from dataclasses import dataclass, field, replace
from typing import NamedTuple

from ds_cmli.allocator.allocator import CachingAllocator
from ds_cmli.allocator.beginning import beginning
from ds_cmli.allocator.blocks import DEFAULT_POOL, MIN_BLOCK, Block, segment_bytes
from ds_cmli.allocator.expandable import ExpandableAllocator
from ds_cmli.allocator.pools import Recorded, infer_pools
from ds_cmli.allocator.state import Entry, Snapshot, State, entries, restore
from ds_cmli.allocator.what_if import INVENTED

TAKEN = ("segment_alloc", "segment_map")
ROUNDS = 1000  # limit for the number of replays; each one corrects one remainder


@dataclass
class Replayed:
    """The replay of one device's history.

    "recorded" is what CUDA's allocator did, "replayed" what the model did.
    """

    device: int
    allocations: int = 0
    # Allocations for which the model chose the same block as CUDA's allocator.
    at_recorded_address: int = 0
    segments_recorded: list[int] = field(default_factory=list)  # bytes of each new segment
    segments_replayed: list[int] = field(default_factory=list)
    reserved_peak_recorded: int = 0
    reserved_peak_replayed: int = 0
    allocated_peak: int = 0
    ambiguous: int = 0  # blocks from before the history whose remainder stays unknown
    unknown: int = 0  # frees of blocks or segments that the model could not repeat
    out_of_memory: int = 0  # requests that were refused
    # Released segments whose pool is not recorded: those that the requests show to be private, and,
    # in a history with private pools, those of which they show nothing.
    released_private: int = 0
    released_unknown: int = 0
    # (allocated, reserved) after each event.
    timeline: list[tuple[int, int]] = field(default_factory=list, repr=False)
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
        values = dict(vars(self))
        del values["timeline"], values["start"]
        for name in ("segments_recorded", "segments_replayed"):
            values[name] = len(values[name])
        return values


def replay_history(snapshot: Snapshot, device: int) -> Replayed:
    """Replay the requests of `device`.

    The history supplies what the model cannot know: the addresses of new segments, when the last
    stream was done with a freed block (`free_completed`), and which segments were returned.

    Raises:
        UserError: the model's rules do not cover the history, or it contradicts itself.
    """
    out = _with_pools(snapshot, device, by_address=False)
    if not out.exact:
        older = _with_pools(snapshot, device, by_address=True)
        out = max(out, older, key=lambda replayed: replayed.at_recorded_address)
    start = out.start
    private: set[int] = set()
    if out.exact or start.settings.expandable_segments:
        private = start.private
    out.released_private = len(private)
    if start.pools() - {DEFAULT_POOL}:
        out.released_unknown = len(start.assumed_pools.keys() - private)
    return out


def _with_pools(snapshot: Snapshot, device: int, by_address: bool) -> Replayed:
    """The replay that finds the most allocations at their recorded address.

    `by_address`: by rule 3 as it was before torch 2.13, which no history names.
    """

    def begin() -> State:
        start = beginning(snapshot, device)
        start.settings = replace(start.settings, by_address=by_address)
        return start

    trace, start = entries(snapshot["device_traces"][device]), begin()
    out = _with_remainders(trace, start, device)
    if start.assumed_pools and not start.settings.expandable_segments:
        for uncertain in (False, True):
            if out.exact:
                break
            start = begin()
            start = start.with_pools(*infer_pools(start, trace, uncertain))
            guess = _with_remainders(trace, start, device)
            if guess.at_recorded_address > out.at_recorded_address:
                out = guess
    return out


def _with_remainders(trace: list[Entry], start: State, device: int) -> Replayed:
    for _ in range(ROUNDS):
        replay = _Replay(start, device)
        correction = replay.run(trace)
        if correction is None:
            break
        correction.correct(start)
    replay.out.ambiguous = sum(least < most for least, most in start.remainders.values())
    return replay.out


class LargerRemainder(NamedTuple):
    """The least remainder of a block that explains why the free block behind it was skipped."""

    block: int  # its address
    remainder: int

    def correct(self, start: State) -> None:
        _, most = start.remainders[self.block]
        start.remainders[self.block] = self.remainder, most


class OlderSegment(NamedTuple):
    """The greatest number of a segment from before the history that explains its choice."""

    segment: int  # its address
    number: int

    def correct(self, start: State) -> None:
        start.numbers[self.segment] = self.number


Correction = LargerRemainder | OlderSegment


class _Replay:
    """One replay of a history."""

    def __init__(self, start: State, device: int):
        self.start, self.recorded = start, Recorded(start)
        self.allocator, self.blocks = restore(start)
        # Blocks whose remainder is uncertain -> their size without it.
        self.uncertain: dict[int, int] = {}
        for address, (least, most) in start.remainders.items():
            if least < most:
                self.uncertain[address] = start.rounded(start.live[address])
        # Addresses of recorded segments that the model has not asked for yet.
        self.offered: list[int] = []
        self.reserved = self.allocator.reserved  # as recorded
        self.out = Replayed(device, start=start)
        self.out.reserved_peak_recorded = self.reserved
        self._note_peaks()

    def run(self, trace: list[Entry]) -> Correction | None:
        """Replay all events.

        If the model chooses a free block that CUDA's allocator skipped, and the remainder of the
        block in front of it is uncertain, this stops and returns the correction.
        """
        for number, entry in enumerate(trace):
            if entry.action == "alloc" and entry.size:
                correction = self._allocate(entry)
                if correction is not None:
                    return correction
            else:
                self._follow(entry)
            self.recorded.follow(number, entry)
            self._note_peaks()
            self.out.timeline.append((self.allocator.allocated, self.allocator.reserved))
        return None

    def _note_peaks(self) -> None:
        out, allocator = self.out, self.allocator
        out.reserved_peak_recorded = max(out.reserved_peak_recorded, self.reserved)
        out.reserved_peak_replayed = max(out.reserved_peak_replayed, allocator.reserved)
        out.allocated_peak = max(out.allocated_peak, allocator.allocated)

    def _follow(self, entry: Entry) -> None:
        """Repeat an event that is no allocation."""
        done = True
        if entry.action in TAKEN:
            self.out.segments_recorded.append(entry.size)
            self.offered.append(entry.address)
            self.reserved += entry.size
        elif entry.action == "free_completed" and entry.size:
            done = entry.address in self.blocks
            if done:
                self.allocator.free(self.blocks.pop(entry.address))
                self.uncertain.pop(entry.address, None)
        elif entry.action == "segment_free":
            self.reserved -= entry.size
            segment = self.allocator.segments.get(entry.address)
            done = segment is not None and segment.free
            if segment is not None and segment.free:
                self.allocator.release(segment)
        elif entry.action == "segment_unmap":
            self.reserved -= entry.size
            done = isinstance(self.allocator, ExpandableAllocator) and self.allocator.unmap_at(
                entry.address, entry.size
            )
        elif entry.action == "oom":
            self.out.out_of_memory += 1
        self.out.unknown += not done

    def _allocate(self, entry: Entry) -> Correction | None:
        allocator, out = self.allocator, self.out
        expandable = self.start.settings.expandable_segments
        if expandable:
            offered = self.offered[:1]
        else:
            segment = self.recorded.segment(entry.address)
            offered = [address for address in self.offered if address == segment]
        allocator.next_address = INVENTED + (out.allocations << 42)
        size = segment_bytes(self.start.rounded(entry.size))
        if offered and _is_vacant(allocator, offered[0], size):
            allocator.next_address = offered[0]
        allocator.actions.clear()
        block = allocator.malloc(entry.size, entry.stream, pool=self.recorded.pool(entry))
        correction = self._correction(block, entry)
        if correction is not None:
            return correction
        out.segments_replayed += [done.bytes for done in allocator.actions if done.name in TAKEN]
        # A segment serves the request at its address: if the model did not need it, it is not kept
        # for later. Other new segments are those of other threads' requests.
        if expandable:
            self.offered = []
        else:
            self.offered = [address for address in self.offered if address not in offered]
        self.blocks[entry.address] = block
        out.allocations += 1
        out.at_recorded_address += block.address == entry.address
        return None

    def _correction(self, block: Block, entry: Entry) -> Correction | None:
        """The correction after which the model does not choose `block` for a request any more."""
        before, taken = block.before, self.allocator.at.get(entry.address)
        if block.address == entry.address:
            return None
        if taken is not None and self._chosen_by_age(block, taken):
            return OlderSegment(taken.segment.address, block.segment.number - 1)
        if before is None:
            return None
        if before.address not in self.uncertain or self.blocks.get(before.address) is not before:
            return None
        remainder = before.size - self.uncertain[before.address]
        remainder += self._size(block) - self.start.rounded(entry.size) + MIN_BLOCK
        if remainder > self.start.remainders[before.address][1]:
            return None
        return LargerRemainder(before.address, remainder)

    def _chosen_by_age(self, block: Block, taken: Block) -> bool:
        """Whether `taken` comes before `block` if its segment is older, which may be so."""
        first, other = block.segment, taken.segment
        least = -len(self.start.segments)
        return (
            not self.start.settings.by_address
            and least < first.number <= 0
            and least <= other.number <= 0
            and first.key == other.key
            and self._size(block) == taken.size
        )

    def _size(self, block: Block) -> int:
        """The size of the free block that a request has just split."""
        after = block.after
        return block.size + (after.size if after is not None and after.free else 0)


def _is_vacant(allocator: CachingAllocator, address: int, size: int) -> bool:
    """Whether the model has nothing where a new segment begins.

    It may have kept what CUDA's allocator returned.
    """
    for segment in allocator.segments.values():
        end = segment.address + segment.size
        if isinstance(allocator, ExpandableAllocator):
            end = segment.blocks()[-1].address + 1
        if segment.address < address + size and address < end:
            return False
    return True
