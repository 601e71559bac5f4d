"""A GPU that is not there, as DeepSpeed and training ask `torch.cuda` about it."""

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import torch

from ds_cmli.fake_cuda.recorder import Recorder
from ds_cmli.fake_cuda.streams import Event, Stream
from ds_cmli.memory_model.caching_allocator import MIN_BLOCK
from ds_cmli.memory_model.gpus import Gpu


class RandomNumbers(torch.Generator):
    """A GPU's generator, whose state of 16 bytes on the host has no values here."""

    def get_state(self) -> torch.Tensor:
        return torch.zeros(16, dtype=torch.uint8)

    def set_state(self, state: torch.Tensor) -> "RandomNumbers":
        return self


def _always(value: object) -> Callable[..., object]:
    return lambda *_, **__: value


# What functions of torch.cuda return that need no state.
ANSWERS = {
    "init _lazy_init set_device manual_seed manual_seed_all set_rng_state ipc_collect": None,
    "reset_peak_memory_stats reset_max_memory_allocated reset_max_memory_cached": None,
    "range_push range_pop": None,
    "is_available is_initialized is_bf16_supported": True,
    "_is_in_bad_fork is_current_stream_capturing": False,
    "current_device _exchange_device _maybe_exchange_device initial_seed": 0,
    "device_count": 1,
}


def functions(gpu: Gpu, recorder: Recorder) -> dict[str, object]:
    """The functions and classes of `torch.cuda` for this GPU, by name."""
    generator = RandomNumbers("cuda")
    properties = SimpleNamespace(name=gpu.name, shared_memory_per_block=48 * 1024)
    properties.major, properties.minor = gpu.capability
    properties.total_memory, properties.multi_processor_count = gpu.total.bytes, gpu.multiprocessors
    properties.max_threads_per_multi_processor = gpu.threads
    properties.shared_memory_per_block_optin = gpu.shared

    @contextmanager
    def stream(on: Stream | None) -> Iterator[None]:
        before, Stream.current = Stream.current, on or Stream.current
        try:
            yield
        finally:
            Stream.current = before

    def synchronize(*_: object) -> None:
        for work in Stream.works.values():
            work.finish(work.launched)

    def empty_cache() -> None:
        synchronize()  # as PyTorch's allocator does
        recorder.empty_cache()

    def memory_stats(*_: object, **__: object) -> dict[str, int]:
        allocated = sum(-(-live.bytes // MIN_BLOCK) * MIN_BLOCK for live in recorder.live.values())
        return defaultdict(int, {"allocated_bytes.all.current": allocated})

    stateless = {name: _always(x) for names, x in ANSWERS.items() for name in names.split()}
    return stateless | {
        "get_device_properties": _always(properties),
        "get_device_capability": _always(gpu.capability),
        "get_device_name": _always(gpu.name),
        "default_generators": (generator,),
        "memory_stats": memory_stats,
        "get_rng_state": lambda *_: generator.get_state(),
        "empty_cache": empty_cache,
        "synchronize": synchronize,
        "current_stream": lambda *_: Stream.current,
        "default_stream": lambda *_: Stream(number=0),
        "set_stream": lambda on: setattr(Stream, "current", on),
        "stream": stream,
        "device": nullcontext,
        "Stream": Stream,
        "Event": Event,
    }
