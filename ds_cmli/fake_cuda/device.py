"""A GPU that is not there, as a program asks `torch.cuda` about it."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from ctypes import CDLL, CFUNCTYPE, c_int64, c_void_p, cast
from types import SimpleNamespace

import torch

from ds_cmli.fake_cuda import guard
from ds_cmli.fake_cuda.recorder import Recorder
from ds_cmli.fake_cuda.steps import StepRecorder
from ds_cmli.fake_cuda.streams import Stream, StreamEvent, Work
from ds_cmli.memory_model.blocks import Block
from ds_cmli.memory_model.caching_allocator import CachingAllocator
from ds_cmli.memory_model.gpus import Gpu


class Streams:
    """The current stream, for which a recorder's allocations are."""

    def __init__(self, recorder: StepRecorder):
        Stream.created, Stream.works = {}, defaultdict(Work)
        self.recorder, self.default = recorder, Stream.numbered(0)
        self._followed: list[object] = []  # what autograd calls
        self.events: list[StreamEvent] = []  # of autograd
        if guard.loaded is not None:
            self._follow_autograd(guard.loaded)
        self.set(self.default)

    def set(self, stream: Stream) -> None:
        Stream.current, self.recorder.stream = stream, stream.stream_id
        if guard.loaded is not None:
            c_int64.in_dll(guard.loaded, "fits_stream").value = stream.stream_id

    def _follow_autograd(self, library: CDLL) -> None:
        """Let autograd's own streams, events and uses of tensors count as the program's."""
        functions = {
            "fits_switched": CFUNCTYPE(None, c_int64)(lambda to: self.set(Stream.numbered(to))),
            "fits_recorded": CFUNCTYPE(c_int64, c_int64)(self._recorded),
            "fits_waited": CFUNCTYPE(None, c_int64, c_int64)(self._waited),
            "fits_used": CFUNCTYPE(None, c_void_p, c_int64)(self._used),
        }
        for name, function in functions.items():
            c_void_p.in_dll(library, name).value = cast(function, c_void_p).value
        self._followed += functions.values()
        library.fits_register()

    def _recorded(self, stream: int) -> int:
        """An event's number: its place in the list of events."""
        self.events.append(Stream.numbered(stream).record_event())
        return len(self.events)

    def _waited(self, stream: int, event: int) -> None:
        Stream.numbered(stream).wait_event(self.events[event - 1])

    def _used(self, storage: int, stream: int) -> None:
        known = self.recorder.live.get(storage)
        if known is not None:
            self.recorder.used(known.block, Stream.numbered(stream))

    @contextmanager
    def on(self, stream: Stream | None) -> Iterator[Stream | None]:
        """Inside, `stream` is the current one; None changes nothing."""
        before = Stream.current
        if stream is not None:
            self.set(stream)
        try:
            yield stream
        finally:
            self.set(before)

    def synchronize(self, *_: object) -> None:
        for work in Stream.works.values():
            work.finish(work.launched)

    def empty_cache(self) -> None:
        self.synchronize()  # as PyTorch's allocator does
        self.recorder.record_emptied_cache()


class Memory:
    """What PyTorch's allocator would count of a program so far."""

    def __init__(self, recorder: Recorder):
        self.recorder, self.allocator = recorder, CachingAllocator()
        self.followed = 0  # changes of the recorder's log
        self.blocks: dict[int, Block] = {}
        self.peaks: Counter[str] = Counter()

    def follow(self) -> Counter[str]:
        """Return the bytes now."""
        for block, size, _ in self.recorder.log[self.followed :]:
            if size > 0 and block not in self.blocks:
                stream = self.recorder.blocks[block].stream
                self.blocks[block] = self.allocator.malloc(size, stream)
            elif size < 0 and block in self.blocks:
                self.allocator.free(self.blocks.pop(block))
            elif size == 0:
                self.allocator.empty_cache()
            self.peaks |= self._now()
        self.followed = len(self.recorder.log)
        return self._now()

    def _now(self) -> Counter[str]:
        kinds = ("requested", "allocated", "reserved")
        held = {kind: getattr(self.allocator, kind) for kind in kinds}
        return Counter(held | {"active": held["allocated"]})

    def stats(self, *_: object, **__: object) -> dict[str, int]:
        """Replaces `torch.cuda.memory_stats`; what is not counted is 0."""
        counts: dict[str, int] = defaultdict(int, num_ooms=0, num_alloc_retries=0)
        for kind, size in self.follow().items():
            counts[f"{kind}_bytes.all.current"] = size
            counts[f"{kind}_bytes.all.peak"] = self.peaks[kind]
        return counts

    def reset_peaks(self, *_: object, **__: object) -> None:
        self.peaks = self.follow()


def _always(value: object) -> Callable[..., object]:
    return lambda *_, **__: value


def properties(gpu: Gpu) -> SimpleNamespace:
    """What `torch.cuda.get_device_properties` returns."""
    major, minor = gpu.capability
    return SimpleNamespace(
        name=f"NVIDIA {gpu.name}",
        major=major,
        minor=minor,
        total_memory=gpu.total.bytes,
        multi_processor_count=gpu.multiprocessors,
        max_threads_per_multi_processor=gpu.limits.threads,
        shared_memory_per_block=48 << 10,
        shared_memory_per_block_optin=gpu.limits.shared,
        regs_per_multiprocessor=65536,
        max_threads_per_block=1024,
        warp_size=32,
        is_integrated=0,
        gcnArchName="",
    )


class RandomNumbers(torch.Generator):
    """A GPU's generator, whose state of 16 bytes on the host has no values here."""

    def get_state(self) -> torch.Tensor:
        return torch.zeros(16, dtype=torch.uint8)

    def set_state(self, state: torch.Tensor) -> "RandomNumbers":
        return self


NOTHING = """
init _lazy_init set_device manual_seed manual_seed_all seed seed_all
set_rng_state set_rng_state_all ipc_collect
set_per_process_memory_fraction reset_accumulated_memory_stats _record_memory_history _snapshot
_dump_snapshot
"""


def functions(gpu: Gpu, recorder: StepRecorder) -> dict[str, object]:
    """The functions and classes of `torch.cuda` and `torch.cuda.memory` for this GPU, by name."""
    streams, memory = Streams(recorder), Memory(recorder)
    by_name: dict[str, object] = {name: _always(None) for name in NOTHING.split()}
    for name in ("is_available", "is_initialized", "is_bf16_supported", "can_device_access_peer"):
        by_name[name] = _always(True)
    for name in ("peak_memory_stats", "max_memory_allocated", "max_memory_cached"):
        by_name[f"reset_{name}"] = memory.reset_peaks
    major, minor = gpu.capability
    generator = RandomNumbers("cuda")
    by_name |= {
        "device_count": _always(1),
        "current_device": _always(0),
        "_exchange_device": _always(0),
        "_maybe_exchange_device": _always(0),
        "initial_seed": _always(0),
        "_is_in_bad_fork": _always(False),
        "is_current_stream_capturing": _always(False),
        "get_device_properties": _always(properties(gpu)),
        "get_device_capability": _always(gpu.capability),
        "get_device_name": _always(f"NVIDIA {gpu.name}"),
        "get_arch_list": _always([f"sm_{major}{minor}"]),
        "default_generators": (generator,),
        "memory_stats": memory.stats,
        "mem_get_info": lambda *_: (gpu.usable - memory.follow()["reserved"], gpu.total.bytes),
        "get_rng_state": lambda *_: generator.get_state(),
        "get_rng_state_all": lambda: [generator.get_state()],
        "_cuda_attach_out_of_memory_observer": _always(None),
        "_cuda_getCurrentRawStream": _always(0),
        "_cuda_cudaCachingAllocator_is_enabled": _always(True),
        "empty_cache": streams.empty_cache,
        "synchronize": streams.synchronize,
        "current_stream": lambda *_: Stream.current,
        "default_stream": _always(streams.default),
        "set_stream": streams.set,
        "stream": streams.on,
        "device": nullcontext,
        "Stream": Stream,
        "Event": StreamEvent,
    }
    return by_name
