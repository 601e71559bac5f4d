"""The memory inside operators: workspaces of CPU libraries, copies of gloo.

On a CPU, oneDNN's matrix products and convolutions copy operands into internal buffers, whose size
depends on the processor, the shapes and the number of threads; no formula is published.
Normalisations add up in one row for each thread, lookups make their indices contiguous, and
operands of several dtypes are first cast to a common one. So this memory is measured: the single
operator runs on zeros of these shapes, under the profiler, which reports the allocator's events.
"""

import functools
from itertools import accumulate

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves

from ds_cmli.memory import cpu_events

aten = torch.ops.aten
LIBRARY_OPS = {
    aten.mm.default,
    aten.addmm.default,
    aten.bmm.default,
    aten.baddbmm.default,
    aten.convolution.default,
    aten.convolution_backward.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_flash_attention_for_cpu_backward.default,
    aten.native_layer_norm.default,
    aten.native_layer_norm_backward.default,
    aten.native_batch_norm.default,
    aten.native_batch_norm_backward.default,
    aten.native_group_norm.default,
    aten.native_group_norm_backward.default,
    aten.embedding.default,
    aten.embedding_dense_backward.default,
    aten.gather.default,
    aten.sum.default,
    aten.sum.dim_IntList,
    aten.logsumexp.default,
    aten.sort.values_stable,
    aten._embedding_bag.default,
    aten._embedding_bag_forward_only.default,
}
# The first two cast while they copy, without a temporary; the last has numbers of repeats too.
CASTS = {aten.copy_.default, aten._to_copy.default, aten.repeat_interleave.self_Tensor}


# The index of the argument that gloo makes a flat copy of, for each collective; all_reduce and
# broadcast work in place.
GLOO_COPIES = {
    torch.ops.c10d._allgather_base_.default: 0,
    torch.ops.c10d.allgather_.default: 0,
    torch.ops.c10d._reduce_scatter_base_.default: 1,
}


def workspace_bytes(func: OpOverload, args: tuple, kwargs: dict[str, object] | None) -> int:
    """Bytes of `func` at its peak besides its results, with torch's number of CPU threads.

    Args:
        args, kwargs: real or fake tensors: only their sizes, strides and dtypes matter.
    """
    if func not in LIBRARY_OPS and not _casts_operands(func, args):
        return 0
    named = tuple(sorted((kwargs or {}).items()))
    described = tuple(map(_described, args))
    return _asked(func, described, tuple(map(_described, named)), torch.get_num_threads())


def _casts_operands(func: OpOverload, args: tuple) -> bool:
    """Whether an ATen operator gets tensors of several dtypes, not counting numbers."""
    types = {t.dtype for t in tree_leaves(args) if isinstance(t, Tensor) and t.dim()}
    return len(types) > 1 and func.namespace == "aten" and func not in CASTS


class _Tensor(tuple):
    """Size, strides and dtype of a tensor."""


def _described(value: object) -> object:
    if isinstance(value, Tensor):
        return _Tensor((tuple(value.shape), tuple(value.stride()), value.dtype))
    if isinstance(value, list | tuple):
        return tuple(map(_described, value))
    return value


def _zeros(value: object) -> object:
    if isinstance(value, _Tensor):
        size, stride, dtype = value
        elements = 0
        if 0 not in size:
            elements = 1 + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        return torch.zeros(elements, dtype=dtype).as_strided(size, stride)
    if isinstance(value, tuple):
        return list(map(_zeros, value))
    return value


@functools.cache
def _asked(func: OpOverload, args: tuple, kwargs: tuple, threads: int) -> int:
    returned: list[object] = []
    with _disable_current_modes():
        operands = list(map(_zeros, args))
        named = {name: _zeros(value) for name, value in kwargs}
        # The first call is not measured: what a library allocates there and keeps is no workspace.
        func(*operands, **named)
        sizes = cpu_events.sizes(lambda: returned.append(func(*operands, **named)))
    live = [0, *accumulate(sizes)]
    return max(live) - live[-1]  # at the end only the returned tensors are live


def copied_bytes(func: OpOverload, args: tuple, backend: str) -> int:
    """Bytes of the copies that `backend` makes for itself while the collective operator `func`
    runs.

    gloo makes copies in all-gathers and reduce-scatters. NCCL makes none, and its own buffers lie
    outside torch's allocator. While several collectives are in flight together, such as ZeRO-3's
    all-gathers after a step, gloo may hold several copies at once. How many depends on timing; the
    prediction counts one.
    """
    if backend != "gloo" or func not in GLOO_COPIES:
        return 0
    copied = tree_leaves(args[GLOO_COPIES[func]])
    return sum(tensor.nbytes for tensor in copied if isinstance(tensor, Tensor))
