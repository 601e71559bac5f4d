"""The allocator's model beside what CUDA's allocator did: a recorded history, replayed.

Errors of the model show here apart from errors of the prediction: the requests are the recorded ones.
"""

from dataclasses import dataclass, field
from typing import Any

from ds_cmli.memory.allocator import CachingAllocator

INVENTED = 1 << 62  # addresses of segments that the model takes and the recording does not have


@dataclass
class Comparison:
    allocations: int = 0
    at_recorded_address: int = 0  # of these: the model chose the block that CUDA's allocator chose
    segments_recorded: list[int] = field(default_factory=list)  # bytes of each segment_alloc, in order
    segments_predicted: list[int] = field(default_factory=list)
    reserved_peak_recorded: int = 0
    reserved_peak_predicted: int = 0
    unknown: int = 0  # frees of blocks and segments that the recording never saw allocated

    @property
    def exact(self) -> bool:
        return (
            self.allocations > 0
            and self.unknown == 0
            and self.at_recorded_address == self.allocations
            and self.segments_predicted == self.segments_recorded
        )

    @property
    def reserved_error(self) -> float:
        """Relative, of the peak."""
        return self.reserved_peak_predicted / self.reserved_peak_recorded - 1 if self.reserved_peak_recorded else 0.0


def replay_trace(snapshot: dict[str, Any], device: int = 0) -> Comparison:
    """Replay the requests of a recorded history through the model, and compare what was reserved for them.

    Args:
        snapshot: of `torch.cuda.memory._snapshot()`, its history recorded from before the first allocation. The model
            is told what it cannot know: the addresses that the device gave, when a block's last stream was done with
            it (`free_completed`), and when the program emptied the cache (`segment_free`).

    Raises:
        ValueError: a history recorded with expandable segments, which follow other rules.
    """
    out = Comparison()
    allocator = CachingAllocator()
    blocks = {}
    given: list[int] = []  # addresses of recorded segments that the model has not asked for yet
    reserved, sizes = 0, {}
    for entry in snapshot["device_traces"][device]:
        action, address, size = entry["action"], entry.get("addr", 0), entry.get("size", 0)
        if action == "segment_alloc":
            out.segments_recorded.append(size)
            given.append(address)
            sizes[address] = size
            reserved += size
        elif action == "alloc":
            allocator.next_address = given.pop(0) if given else INVENTED + (out.allocations << 40)
            known = len(allocator.segments)
            block = allocator.malloc(size, entry.get("stream", 0))
            if len(allocator.segments) > known:
                out.segments_predicted.append(block.segment.size)
            given.clear()  # one for each request: a segment that the model did not need is a difference, not a stock
            blocks[address] = block
            out.allocations += 1
            out.at_recorded_address += block.address == address
        elif action == "free_completed":
            if address in blocks:
                allocator.free(blocks.pop(address))
            else:
                out.unknown += 1
        elif action == "segment_free":
            reserved -= sizes.pop(address, 0)
            segment = allocator.segments.get(address)
            if segment is not None and not segment.first.requested and segment.first.after is None:
                allocator.release(segment)
            else:
                out.unknown += 1
        elif action in ("segment_map", "segment_unmap"):
            raise ValueError("recorded with expandable segments: unset PYTORCH_ALLOC_CONF and record again")
        out.reserved_peak_recorded = max(out.reserved_peak_recorded, reserved)
        out.reserved_peak_predicted = max(out.reserved_peak_predicted, allocator.reserved)
    return out
