"""A GPU that is not there, as a program asks `torch.cuda` about it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import torch

from ds_cmli.allocator.gpus import Gpu


class Event:
    """An event that is over at once."""

    def __init__(self, *_: object, **__: object):
        pass

    def record(self, stream: object = None) -> None:
        pass

    def wait(self, stream: object = None) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: "Event") -> float:
        return 1.0


class Stream:
    """A stream without work; all streams are one."""

    created = 0
    cuda_stream = stream_id = device_index = priority = 0
    device_type = 1

    def __init__(self, *_: object, **__: object):
        Stream.created += 1

    @property
    def device(self) -> torch.device:
        return torch.device("cuda", 0)

    def wait_stream(self, stream: object) -> None:
        pass

    wait_event = wait_stream

    def record_event(self, event: Event | None = None) -> Event:
        return event or Event()

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return True

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *_: object) -> None:
        pass


class Device:
    """The context manager `torch.cuda.device`."""

    def __init__(self, *_: object):
        pass

    def __enter__(self) -> "Device":
        return self

    def __exit__(self, *_: object) -> None:
        pass


@contextmanager
def _stream(stream: object) -> Iterator[object]:
    yield stream


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
        warp_size=32,
        is_integrated=0,
        gcnArchName="",
    )


NOTHING = """
init _lazy_init set_device synchronize set_stream manual_seed manual_seed_all seed seed_all
set_rng_state set_rng_state_all reset_peak_memory_stats reset_max_memory_allocated ipc_collect
"""


def functions(gpu: Gpu, live: Callable[[], int], empty_cache: Callable) -> dict[str, object]:
    """The functions and classes of `torch.cuda` for this GPU, by name.

    Args:
        live: the requested bytes that are allocated now.
        empty_cache: called when the program empties the allocator's cache.
    """
    main = Stream()
    Stream.created = 0
    found: dict[str, object] = dict.fromkeys(NOTHING.split(), _always(None))
    for name in ("is_available", "is_initialized", "is_bf16_supported", "can_device_access_peer"):
        found[name] = _always(True)
    for name in ("memory_allocated", "max_memory_allocated", "memory_reserved"):
        found[name] = lambda *_, **__: live()
    major, minor = gpu.capability
    found |= {
        "max_memory_reserved": found["memory_reserved"],
        "device_count": _always(1),
        "current_device": _always(0),
        "_is_in_bad_fork": _always(False),
        "is_current_stream_capturing": _always(False),
        "get_device_properties": _always(properties(gpu)),
        "get_device_capability": _always(gpu.capability),
        "get_device_name": _always(f"NVIDIA {gpu.name}"),
        "get_arch_list": _always([f"sm_{major}{minor}"]),
        "memory_summary": _always(""),
        "memory_stats": lambda *_, **__: {
            f"{kind}_bytes.all.{when}": live()
            for kind in ("allocated", "reserved", "active")
            for when in ("current", "peak")
        },
        "mem_get_info": lambda *_: (gpu.usable - live(), gpu.total.bytes),
        "get_rng_state": lambda *_: torch.zeros(16, dtype=torch.uint8),
        "get_rng_state_all": lambda: [torch.zeros(16, dtype=torch.uint8)],
        "empty_cache": lambda: empty_cache(),
        "current_stream": _always(main),
        "default_stream": _always(main),
        "stream": _stream,
        "device": Device,
        "Stream": Stream,
        "Event": Event,
    }
    return found
