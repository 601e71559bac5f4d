"""Streams and events of a GPU that is not there.

A card runs behind its host: what was launched counts as done when somebody has waited for it, or
when MOST_AHEAD launches have followed on its stream. Until then the allocator keeps what another
stream may still read (`Tensor.record_stream`). A card that keeps up with its host needs less.
"""

from typing import ClassVar

import torch

MOST_AHEAD = 1024  # launches that a stream can hold
MOST_ASKED = 1000  # times that an event is not over, so that a loop that asks for it ends


class Work:
    """What has been launched on a stream, and how much of it is known to be done."""

    def __init__(self) -> None:
        self.launched = self.done = 0
        # What was launched after the first number runs after the other stream's second one.
        self.waits: dict[Work, tuple[int, int]] = {}

    def launch(self) -> None:
        self.launched += 1
        self.finish(self.launched - MOST_AHEAD)

    def finish(self, number: int) -> None:
        if number <= self.done:
            return
        self.done = number
        for other, (since, until) in list(self.waits.items()):
            if since < number and other in self.waits:
                del self.waits[other]
                other.finish(until)

    def wait(self, other: "Work", until: int) -> None:
        if other is not self and other.done < until:
            self.waits[other] = self.launched, until
            self.launch()  # the wait, which somebody may wait for in turn


class StreamEvent:
    """A place in the work of a stream."""

    def __init__(self, *_: object, **__: object):
        self.work, self.number, self.asked = Work(), 0, 0  # over, until it is recorded

    def record(self, stream: "Stream | None" = None) -> None:
        self.work = (stream or Stream.current).work
        self.number, self.asked = self.work.launched, 0

    def wait(self, stream: "Stream | None" = None) -> None:
        (stream or Stream.current).wait_event(self)

    def synchronize(self) -> None:
        self.work.finish(self.number)

    @property
    def is_over(self) -> bool:
        return self.work.done >= self.number

    def query(self) -> bool:
        self.asked += 1
        if self.asked > MOST_ASKED:
            self.synchronize()
        return self.is_over

    def elapsed_time(self, end: "StreamEvent") -> float:
        return 1.0


class Stream:
    """A stream of a program's own, or the default one (number 0)."""

    MOST = 32  # PyTorch has this many of each priority, and gives them out in turn
    created: ClassVar[dict[int, int]] = {}  # by priority
    works: ClassVar[dict[int, Work]] = {}  # by number
    current: ClassVar["Stream"]
    device_index, device_type = 0, 1

    def __init__(self, device: object = None, priority: int = 0, **_: object):
        turn = Stream.created.get(priority, 0)
        Stream.created[priority] = turn + 1
        self.priority = priority
        self.stream_id = 1 + turn % self.MOST + self.MOST * abs(priority)

    @classmethod
    def numbered(cls, number: int) -> "Stream":
        """The default stream, 0, or one that has been created."""
        out = cls.__new__(cls)
        out.priority, out.stream_id = 0, number
        return out

    @property
    def work(self) -> Work:
        return Stream.works[self.stream_id]

    @property
    def cuda_stream(self) -> int:
        return self.stream_id

    @property
    def device(self) -> torch.device:
        return torch.device("cuda", 0)

    def wait_stream(self, stream: "Stream") -> None:
        self.work.wait(stream.work, stream.work.launched)

    def wait_event(self, event: StreamEvent) -> None:
        self.work.wait(event.work, event.number)

    def synchronize(self) -> None:
        self.work.finish(self.work.launched)

    def record_event(self, event: StreamEvent | None = None) -> StreamEvent:
        event = event or StreamEvent()
        event.record(self)
        return event

    def query(self) -> bool:
        return self.record_event().query()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stream) and other.stream_id == self.stream_id

    def __hash__(self) -> int:
        return self.stream_id


class Awaited:
    """Blocks that have ended, and that other streams than their own perhaps still read."""

    def __init__(self) -> None:
        self.uses: dict[int, set[Stream]] = {}  # of blocks that have not ended
        self.pending: list[tuple[int, int, list[StreamEvent]]] = []

    def use(self, block: int, stream: Stream) -> None:
        self.uses.setdefault(block, set()).add(stream)

    def keeps(self, block: int, size: int) -> bool:
        """Whether a block that ends here is still read: it is then one of `over` later."""
        if block not in self.uses:
            return False
        events = [stream.record_event() for stream in self.uses.pop(block)]
        self.pending.append((block, size, events))
        return True

    def over(self) -> list[tuple[int, int]]:
        """Take out the ended blocks that no stream reads any more, each with its bytes."""
        over, pending = [], []
        for block, size, events in self.pending:
            if all(event.is_over for event in events):
                over.append((block, size))
            else:
                pending.append((block, size, events))
        self.pending = pending
        return over
