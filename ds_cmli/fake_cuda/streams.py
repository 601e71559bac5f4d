"""Streams and events of a GPU that is not there.

A GPU runs behind its host. Here a launch counts as done as late as possible: when the program has
waited for it, or when MAX_AHEAD launches have followed on its stream. Until then the allocator
keeps what another stream may still read (`Tensor.record_stream`). A faster GPU needs less memory.
"""

from collections import defaultdict
from typing import Any, ClassVar

import torch

MAX_AHEAD = 1024  # launches that a stream can hold
MAX_QUERIES = 1000  # An event is done after so many queries, so that a loop over `query` ends.


class Work:
    """The launches of a stream, and how many of them are known to be done."""

    def __init__(self) -> None:
        self.launched = self.done = 0
        # other -> (since, until): launches after `since` wait for the other's launch `until`.
        self.waits: dict[Work, tuple[int, int]] = {}

    def launch(self) -> None:
        self.launched += 1
        self.finish(self.launched - MAX_AHEAD)

    def finish(self, until_launch: int) -> None:
        """Count the launches up to this number as done, and what they have waited for."""
        if until_launch <= self.done:
            return
        self.done = until_launch
        for other, (since, until) in list(self.waits.items()):
            # `other.finish` can come back to this method, which then has deleted further waits.
            if since < until_launch and other in self.waits:
                del self.waits[other]
                other.finish(until)

    def wait(self, other: "Work", until: int) -> None:
        """Let all later launches wait for the launch `until` of another stream."""
        if other is not self and other.done < until:
            self.waits[other] = self.launched, until
            self.launch()  # the wait, which somebody may wait for in turn


class Stream(torch.Stream):
    """Stands for `torch.cuda.Stream`; number 0 is the default one."""

    works: ClassVar[dict[int, Work]] = defaultdict(Work)  # by number
    current: ClassVar["Stream"]

    def __new__(
        cls, device: object = None, priority: int = 0, number: int | None = None
    ) -> "Stream":
        number = max(cls.works, default=0) + 1 if number is None else number
        out = super().__new__(cls, stream_id=number, device_index=0, device_type=1)
        cls.works[number]  # makes its Work if there is none
        return out

    @classmethod
    def begin(cls) -> None:
        """Forget all streams but the default one, which becomes the current one."""
        cls.works.clear()
        cls.current = cls(number=0)

    @property
    def work(self) -> Work:
        return Stream.works[self.stream_id]

    def wait_stream(self, stream: Any) -> None:
        self.work.wait(stream.work, stream.work.launched)

    def wait_event(self, event: Any) -> None:
        self.work.wait(event.work, event.number)

    def synchronize(self) -> None:
        self.work.finish(self.work.launched)

    def record_event(self, event: Any = None) -> Any:
        event = event or CudaEvent()
        event.record(self)
        return event


class CudaEvent:
    """Stands for `torch.cuda.Event`: a place in the work of a stream."""

    def __init__(self, *_: object, **__: object):
        self.work = Work()  # done, until the event is recorded
        self.number = 0
        self.num_queries = 0

    def record(self, stream: Stream | None = None) -> None:
        self.work = (stream or Stream.current).work
        self.number = self.work.launched
        self.num_queries = 0

    def wait(self, stream: Stream | None = None) -> None:
        (stream or Stream.current).wait_event(self)

    def synchronize(self) -> None:
        self.work.finish(self.number)

    @property
    def is_done(self) -> bool:
        return self.work.done >= self.number

    def query(self) -> bool:
        self.num_queries += 1
        if self.num_queries > MAX_QUERIES:
            self.synchronize()
        return self.is_done

    def elapsed_time(self, end: "CudaEvent") -> float:
        # No time is known.
        return 1.0
