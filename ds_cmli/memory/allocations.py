"""python -m ds_cmli.memory.allocations ID NAME DEVICE SETTING PASSES: what one implementation asks the allocator for.

Measured by `run`, for each measurement in a process of its own, so that its memory returns and its peak is its own;
predicted by `predict`, the same code on tensors without data.
"""

import json
import sys
import weakref
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ds_cmli.cmli import cmli_peak_bytes
from ds_cmli.memory.estimates import Setting, cmli_op_largest
from ds_cmli.memory.implementations import Implementation, implementations

# Autograd adds gradients up and fills in those of maxima in place, but not where a mode looks on: there the argument
# ends right after these.
IN_PLACE = (torch.ops.aten.add.Tensor, torch.ops.aten.scatter.src)
SMALL = Setting(B=2, P=1, N=4, M=4, H=8, D=8)


@dataclass(frozen=True)
class Allocations:
    largest: int  # bytes of the largest single allocation of forward
    peak: int  # the most held at once above what was live before, over the passes that ran
    passes: str  # "forward", or "forward and backward"


def summarise(forward: Iterable[int], backward: Iterable[int] | None) -> Allocations:
    """From the signed sizes of allocations and their ends, in order; `backward` None: it did not run."""
    forward = list(forward)
    peak = max(accumulate([*forward, *(backward or ())]), default=0)
    return Allocations(max(forward, default=0), max(peak, 0), "forward" + " and backward" * (backward is not None))


def run(implementation: Implementation, device: str, backward: bool, say: Callable = lambda found: None) -> Allocations:
    """Forward as in training, with its graph recorded, and `backward` where asked for and there is a gradient.

    `say` is told what is known after forward: backward may find no memory.
    """
    observe = cuda_sizes if device == "cuda" else cpu_sizes
    inputs = implementation.inputs(device)
    out: list[Tensor] = []
    forward = observe(lambda: out.append(implementation.forward(*inputs)))
    found = summarise(forward, None)
    say(found)
    if backward and out[0].requires_grad:
        found = summarise(forward, observe(out.pop().backward))
        say(found)
    return found


def cpu_sizes(call: Callable[[], object]) -> list[int]:
    """As PyTorch's CPU allocator reports them to its profiler."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        call()
    events = [e for e in prof.profiler.kineto_results.events() if e.name() == "[memory]"]
    return [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]


def cuda_sizes(call: Callable[[], object]) -> list[int]:
    """As PyTorch's CUDA allocator records them: requested bytes, before its rounding."""
    history = torch.cuda.memory
    history._record_memory_history(context=None, stacks="python", max_entries=10**6)
    call()
    torch.cuda.synchronize()  # CPU-GPU sync
    trace = history._snapshot()["device_traces"][torch.cuda.current_device()]
    history._record_memory_history(enabled=None)
    return trace_sizes(trace)


def trace_sizes(trace: list[dict]) -> list[int]:
    """Of the allocator's recorded history on one device."""
    sign = {"alloc": 1, "free_requested": -1}
    return [sign[entry["action"]] * entry["size"] for entry in trace if entry["action"] in sign]


def predict(implementation: Implementation, backward: bool = True) -> Allocations:
    """The same code on fake tensors, which have sizes and lifetimes but no data: any size, in a moment."""
    with FakeTensorMode():
        inputs = implementation.inputs("cpu")
        with StorageSizes(inputs) as seen:
            out = implementation.forward(*inputs)
            largest, peak = seen.largest, seen.peak
            if not (backward and out.requires_grad):
                return Allocations(largest, peak, "forward")
            out.backward()
            return Allocations(largest, seen.peak, "forward and backward")


class StorageSizes(TorchDispatchMode):
    """Follows every storage that an operator returns, from then until it is freed.

    `known`: tensors that were there before.
    """

    def __init__(self, known: Iterable[Tensor]):
        super().__init__()
        self.known = weakref.WeakSet(t.untyped_storage() for t in known)
        self.live = self.peak = self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.update_peak()
        if func.namespace == "ds_cmli":
            at_peak, largest = cmli_op_bytes(func, args)
            self.peak = max(self.peak, self.live + at_peak)
            self.largest = max(self.largest, largest)
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.untyped_storage() not in self.known:
                storage = tensor.untyped_storage()
                self.known.add(storage)
                self.live += storage.nbytes()
                self.largest = max(self.largest, storage.nbytes())
                weakref.finalize(storage, self.freed, storage.nbytes())
        in_backward = torch._C._current_graph_task_id() != -1
        if not (in_backward and func in IN_PLACE):
            self.update_peak()
        return out

    def freed(self, size: int) -> None:
        self.live -= size

    def update_peak(self) -> None:
        self.peak = max(self.peak, self.live)


def cmli_op_bytes(func: Any, args: Any) -> tuple[int, int]:
    """What a pass of the all-pairs op holds at its peak, and its largest tensor: tracing does not see its tiles.

    All tokens being valid, as they are in `implementations`; the largest of backward is left to its results.
    """
    forward = func is torch.ops.ds_cmli.cmli_forward.default
    image, text = args[:2] if forward else args[2:4]
    backend, scratch_bytes = args[4:6] if forward else args[8:10]
    (I, N, D), (J, M, _) = image.shape, text.shape  # noqa: E741
    peak = cmli_peak_bytes(
        I, J, N, M, D, image.dtype, backend=backend, scratch_bytes=scratch_bytes, text_lengths=[M] * J
    )
    if not forward:
        return peak.backward, 0
    return peak.forward, cmli_op_largest(I, J, N, M, D, image.dtype, scratch_bytes) if backend == "chunked" else 0


def main(row: str, name: str, device: str, setting: str, passes: str) -> None:
    # Libraries' workspaces come from the allocator at their first use: not part of any implementation.
    for small in implementations(SMALL).values():
        run(small, device, backward=True)
    implementation = implementations(Setting(**json.loads(setting)))[row, name]
    # Flushed: the process may be ended in the middle of backward.
    say = lambda found: print(json.dumps(asdict(found)), flush=True)  # noqa: E731
    run(implementation, device, passes == "forward and backward", say)


if __name__ == "__main__":
    main(*sys.argv[1:])
