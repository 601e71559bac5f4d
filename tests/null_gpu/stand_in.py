"""python -m tests.null_gpu.stand_in SCRIPT|MODULE OPTIONS: run as by Python, with values that a program asks for.

The null GPU's kernels compute nothing. What a program reads in order to go on, small integers and truth values, is
computed here by the CPU on the GPU's memory, which is the host's; other small results are 0, and all is finite.
"""

import ctypes
import os
import runpy
import sys
from pathlib import Path

import torch
from torch import Tensor
from torch._ops import OpOverloadPacket
from torch.autograd.function import BackwardCFunction
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

MAX_ELEMENTS = 1 << 20  # that are computed
CHECKS = {"isfinite": True, "isinf": False, "isnan": False}


def memory_of(x: Tensor) -> Tensor:
    """Return a CPU tensor on the memory of a tensor of the null GPU."""
    storage = x.untyped_storage()
    raw = (ctypes.c_char * storage.nbytes()).from_address(storage.data_ptr())
    return torch.frombuffer(raw, dtype=x.dtype).as_strided(x.size(), x.stride(), x.storage_offset())


def on_gpu(x: object) -> bool:
    return isinstance(x, Tensor) and x.device.type == "cuda" and 0 < x.numel() <= MAX_ELEMENTS


def on_cpu(x: object) -> object:
    if isinstance(x, Tensor) and x.device.type == "cuda":
        return memory_of(x.detach()) if x.numel() else torch.empty_like(x, device="cpu")
    if isinstance(x, torch.device) or (isinstance(x, str) and x.startswith("cuda")):
        return "cpu"
    return x


class StandIn(TorchFunctionMode):
    """A mode for calls of torch in forward, and inside functions of Python in backward. Autograd's own calls compute
    nothing, and need not. Under a dispatch mode autograd would add gradients up in new tensors.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is Tensor.__getitem__ and isinstance(args[1], list) and any(x is True for x in args[1]):
            # A kernel would count the true ones.
            args = args[0], [place for place, chosen in enumerate(args[1]) if chosen]
        if isinstance(func, OpOverloadPacket) and str(func).startswith("ds_cmli."):
            # Its own calls of torch would not come here: this mode is off while it handles one.
            with self:
                return torch._C._dispatch_call_boxed(func.default._handle, *args, **kwargs)
        name = getattr(func, "__name__", "")
        memory = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if on_gpu(x)}
        result = func(*args, **kwargs)
        set_ = args[:1] if name == "__setitem__" else ()
        results = [x for x in tree_leaves((set_, result)) if on_gpu(x)]
        counted = [x for x in results if not (x.is_floating_point() or x.is_complex())]
        for x in results:
            if name in CHECKS:
                memory_of(x.detach()).fill_(CHECKS[name])
            elif x.is_floating_point() and x.untyped_storage().data_ptr() not in memory and name not in ("to", "cuda"):
                memory_of(x.detach()).zero_()
        if counted and name not in (*CHECKS, "cuda", "empty", "empty_like", "new_empty", "detach", "record_stream"):
            self.compute(func, args, kwargs, result, memory)
        return result

    def compute(self, func, args, kwargs, result, memory) -> None:
        with torch.no_grad(), torch._C.DisableTorchFunction():
            try:
                values = func(*tree_map(on_cpu, args), **tree_map(on_cpu, kwargs))
            except (RuntimeError, TypeError, NotImplementedError):
                return  # a generator of the GPU, a kernel of its own
            for x, value in zip(tree_leaves(result), tree_leaves(values), strict=True):
                # Views, and what was changed in place, have their values.
                new = on_gpu(x) and not x.is_floating_point() and x.untyped_storage().data_ptr() not in memory
                if new and isinstance(value, Tensor) and x.shape == value.shape:
                    memory_of(x).copy_(value)


def backward_with_values(apply=BackwardCFunction.apply):
    def run(self, *grads):
        with StandIn():  # on autograd's thread of the GPU, which has no modes
            return apply(self, *grads)

    return run


def choose_cudnn() -> None:
    """PyTorch asks cuDNN for convolutions in bf16 by its newer interface alone, and the null GPU has the older one. It
    reads the variable once to choose cuDNN, and once again in cuDNN's own code, at the first convolution.
    """
    os.environ.pop("TORCH_CUDNN_V8_API_DISABLED", None)
    if torch.cuda.get_device_capability() >= (8, 0):
        x = torch.empty(1, 1, 1, 1, dtype=torch.bfloat16, device="cuda")
        torch._C._select_conv_backend(x, x, None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1, None)
    os.environ["TORCH_CUDNN_V8_API_DISABLED"] = "1"


def main() -> None:
    del sys.argv[0]
    BackwardCFunction.apply = backward_with_values()
    torch.backends.cuda.enable_cudnn_sdp(False)  # the null GPU has none
    choose_cudnn()
    with StandIn():
        if Path(sys.argv[0]).exists():
            sys.path.insert(0, str(Path(sys.argv[0]).parent))
            runpy.run_path(sys.argv[0], run_name="__main__")
        else:
            runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
