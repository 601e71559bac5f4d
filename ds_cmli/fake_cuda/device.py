"""`fake_cuda` gives a process a GPU that is not there, whose tensors hold no data."""

import ctypes
import gc
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.optim import optimizer
from torch.torch_version import TorchVersion
from torch.utils import _foreach_utils

from ds_cmli.cmli.cpu import compiled
from ds_cmli.cmli.op import add_feature_gradients, score_pairs
from ds_cmli.errors import UserError, blame
from ds_cmli.fake_cuda import kernels
from ds_cmli.fake_cuda.known_values import KnownValues, WithoutData
from ds_cmli.fake_cuda.recorder import Recorder
from ds_cmli.fake_cuda.streams import CudaEvent, Stream
from ds_cmli.memory_model.caching_allocator import MIN_BLOCK, round_up
from ds_cmli.memory_model.gpus import Gpu

OLDEST_TORCH = "2.10"  # The patches below are known to work from this version
NEXT_TORCH = "2.16"  # to before this one.
FOREACH = "_foreach_supported_types"
CUDA_MODULES = (torch.cuda, torch.cuda.memory, torch.cuda.random, torch.cuda.nvtx)
# Results of the functions of torch.cuda that need no state.
ANSWERS = {
    "init _lazy_init set_device manual_seed manual_seed_all set_rng_state ipc_collect": None,
    "reset_peak_memory_stats reset_max_memory_allocated reset_max_memory_cached": None,
    "range_push range_pop": None,
    "is_available is_initialized is_bf16_supported": True,
    "_is_in_bad_fork is_current_stream_capturing": False,
    "current_device _exchange_device _maybe_exchange_device initial_seed": 0,
    "device_count": 1,
}


def _run_with_mode(function: Callable) -> Callable:
    """Return a dispatch rule for an operator of this package: run its function under the same mode.

    Otherwise the mode would see the operator alone, and not what its function allocates.
    """

    def rule(mode, func, types, args, kwargs):
        with mode:
            return function(*args, **kwargs)

    return rule


for _mode in (Recorder, KnownValues):
    torch.library.register_torch_dispatch("ds_cmli::scores", _mode, _run_with_mode(score_pairs))
    torch.library.register_torch_dispatch(
        "ds_cmli::add_feature_gradients", _mode, _run_with_mode(add_feature_gradients)
    )


@contextmanager
def fake_cuda(recorder: Recorder, gpu: Gpu) -> Iterator[None]:
    """Give this process the GPU: its tensors hold no data, and `recorder` records their memory.

    All is undone at the end, so that a process can enter it several times.

    Raises:
        UserError: this version of PyTorch is not known, or there is no compiler.
    """
    from deepspeed.accelerator import get_accelerator, set_accelerator
    from deepspeed.accelerator.cuda_accelerator import CUDA_Accelerator

    Stream.begin()
    without_data = WithoutData(allow_non_fake_inputs=True)
    with ExitStack() as stack:
        stack.callback(torch.set_rng_state, torch.get_rng_state())
        guard().fake_cuda_on()
        stack.callback(guard().fake_cuda_off)
        # Backward runs in this thread: the modes below are those of a thread.
        stack.enter_context(torch.autograd.set_multithreading_enabled(False))
        for owner, name, replacement in _patches(_cuda_functions(gpu, recorder)):
            if hasattr(owner, name):
                stack.enter_context(mock.patch.object(owner, name, replacement))
        stack.enter_context(kernels.registered(gpu))
        stack.callback(set_accelerator, get_accelerator())
        set_accelerator(CUDA_Accelerator())
        stack.callback(gc.collect)  # engines are part of reference cycles
        # `torch.tensor` makes its tensor on the host, and not first one with data on the device.
        stack.callback(torch._C._set_only_lift_cpu_tensors, torch._C._only_lift_cpu_tensors())
        torch._C._set_only_lift_cpu_tensors(True)
        for mode in (without_data, recorder, KnownValues(without_data)):
            stack.enter_context(mode)
        yield


@cache
def guard() -> ctypes.CDLL:
    """Return the small library by which PyTorch's C++ finds the GPU, compiled into the cache."""
    installed = TorchVersion(torch.__version__)
    if installed < OLDEST_TORCH or installed >= NEXT_TORCH:
        supported = f"{OLDEST_TORCH} to before {NEXT_TORCH}"
        raise UserError(f"torch is {installed}: a prediction knows {supported}")
    root = Path(torch.__file__).parent
    flags = ["-std=c++20", f"-I{root / 'include'}", f"-L{root / 'lib'}", "-lc10", "-ltorch_cpu"]
    # Another version has another library.
    flags += [f"-Wl,-rpath,{root / 'lib'}", f"-DFOR_TORCH={installed}"]
    with blame("a prediction compiles with g++ 10 or later, into the folder DS_CMLI_CACHE"):
        return compiled(Path(__file__).parent / "guard.cpp", flags)


def _patches(gpu_functions: dict[str, object]) -> list[tuple[object, str, object]]:
    """Return the replaced parts of PyTorch and DeepSpeed: owner, name, replacement."""
    from deepspeed.ops.op_builder.builder import OpBuilder

    return [
        # These functions ask the driver, which need not be there.
        *((module, *named) for module in CUDA_MODULES for named in gpu_functions.items()),
        # ZeRO-3 replaces it for good by a function that keeps less for backward: this puts it back.
        (F, "linear", F.linear),
        # PyTorch's replaces parameters without data even if nothing changes, and then fails.
        (nn.Module, "_apply", _apply),
        # PyTorch would change neither the tensor's device nor whether it has data.
        (Tensor, "data", _data_of_any_device(Tensor.data)),
        # Optimizers update several tensors at once if their type is listed: add that without data.
        *((x, FOREACH, [*getattr(x, FOREACH), FakeTensor]) for x in (optimizer, _foreach_utils)),
        # DeepSpeed's compiles kernels for a GPU. They update in place and allocate nothing.
        (OpBuilder, "load", kernels.load_without_kernels(OpBuilder.load)),
    ]


def _cuda_functions(gpu: Gpu, recorder: Recorder) -> dict[str, object]:
    """Return the functions and classes of `torch.cuda` for this GPU, by name."""
    properties = SimpleNamespace(name=gpu.name, shared_memory_per_block=48 * 1024)
    properties.major, properties.minor = gpu.capability
    properties.total_memory = gpu.total_bytes
    properties.multi_processor_count = gpu.multiprocessors
    properties.max_threads_per_multi_processor = gpu.max_threads
    properties.shared_memory_per_block_optin = gpu.shared_bytes

    def synchronize(*_: object) -> None:
        for work in Stream.works.values():
            work.finish(work.launched)

    def empty_cache() -> None:
        synchronize()  # as PyTorch's allocator does
        recorder.empty_cache()

    def memory_stats(*_: object, **__: object) -> dict[str, int]:
        allocated = sum(round_up(live.bytes, MIN_BLOCK) for live in recorder.live.values())
        return defaultdict(int, {"allocated_bytes.all.current": allocated})

    stateless: dict[str, object] = {
        name: _always(x) for names, x in ANSWERS.items() for name in names.split()
    }
    return stateless | {
        "get_device_properties": _always(properties),
        "get_device_capability": _always(gpu.capability),
        "get_device_name": _always(gpu.name),
        "memory_stats": memory_stats,
        "get_rng_state": _always(torch.zeros(16, dtype=torch.uint8)),
        "empty_cache": empty_cache,
        "synchronize": synchronize,
        "current_stream": lambda *_: Stream.current,
        "default_stream": lambda *_: Stream(number=0),
        "set_stream": lambda stream: setattr(Stream, "current", stream),
        "stream": lambda stream: mock.patch.object(Stream, "current", stream or Stream.current),
        "device": nullcontext,
        "Stream": Stream,
        "Event": CudaEvent,
    }


def _always(value: object) -> Callable[..., object]:
    return lambda *_, **__: value


def _apply(self: nn.Module, function: Callable, recurse: bool = True) -> nn.Module:
    """Do what `nn.Module._apply` does, but keep each parameter's object: optimizers hold it."""
    for child in self.children() if recurse else ():
        child._apply(function)
    for parameter in self._parameters.values():
        if parameter is not None:
            _convert(parameter, function)
    for name, buffer in self._buffers.items():
        if buffer is not None:
            self._buffers[name] = function(buffer)
    return self


def _data_of_any_device(original: Any) -> property:
    """Return a `Tensor.data` to which data of another device can be assigned, as DeepSpeed does."""

    def assign(self: Tensor, new: Tensor) -> None:
        same_kind = isinstance(self, FakeTensor) == isinstance(new, FakeTensor)
        if same_kind and self.device == new.device:
            original.__set__(self, new)
        else:
            _convert(self, lambda _: new.detach())

    return property(original.__get__, assign)


def _convert(tensor: Tensor, function: Callable[[Tensor], Tensor]) -> None:
    """Turn a tensor into the result of `function`; the object stays the same."""
    with torch.no_grad():
        new = function(tensor)
    if new is tensor:
        return
    if isinstance(tensor, nn.Parameter):
        new = nn.Parameter(new, tensor.requires_grad)
    # `torch.utils.swap_tensors` does this too, but refuses tensors with weak references, which
    # those of FakeTensorMode always have.
    torch._C._swap_tensor_impl(tensor, new)
    tensor.__class__ = type(new)
    vars(tensor).update(vars(new))
