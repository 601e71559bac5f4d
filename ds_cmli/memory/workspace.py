"""Measures memory that a CPU operator allocates and frees internally, which its tensors do not show.

oneDNN's matrix products and convolutions copy operands into internal buffers, whose size depends on the processor, the
shapes and the number of threads; no formula is published. Normalisations add up in one row for each thread, lookups
make their indices contiguous, and operands of several dtypes are first cast to a common one. So the memory is measured:
the single operator runs on zeros of these shapes, under the profiler, which reports the allocator's events.
"""

import functools
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
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
}
# These operators cast while they copy, without a temporary.
CASTS = {aten.copy_.default, aten._to_copy.default}


def workspace_bytes(func: Any, args: tuple, kwargs: dict[str, Any] | None) -> int:
    """Bytes that `func` would hold at its peak besides what it returns, on this CPU with torch's number of threads.

    Args:
        args, kwargs: real or fake tensors: only their sizes, strides and dtypes matter.
    """
    if func not in LIBRARY_OPS and not _casts_operands(func, args):
        return 0
    named = tuple(sorted((kwargs or {}).items()))
    return _asked(func, _described(args), _described(named), torch.get_num_threads())


def _casts_operands(func: Any, args: tuple) -> bool:
    """Whether an ATen operator gets tensors of several dtypes; tensors without dimensions do not count."""
    types = {t.dtype for t in tree_leaves(args) if isinstance(t, Tensor) and t.dim()}
    return len(types) > 1 and func.namespace == "aten" and func not in CASTS


class _Tensor(tuple):
    """Size, strides and dtype of a tensor."""


def _described(value: Any) -> Any:
    if isinstance(value, Tensor):
        return _Tensor((tuple(value.shape), tuple(value.stride()), value.dtype))
    return tuple(map(_described, value)) if isinstance(value, list | tuple) else value


def _zeros(value: Any) -> Any:
    if isinstance(value, _Tensor):
        size, stride, dtype = value
        elements = (
            1 + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
            if 0 not in size
            else 0
        )
        return torch.zeros(elements, dtype=dtype).as_strided(size, stride)
    return [_zeros(part) for part in value] if isinstance(value, tuple) else value


@functools.cache
def _asked(func: Any, args: tuple, kwargs: tuple, threads: int) -> int:
    returned: list[Any] = []
    with _disable_current_modes():
        operands, named = _zeros(args), {name: _zeros(value) for name, value in kwargs}
        func(
            *operands, **named
        )  # not measured: what a library allocates at its first call and keeps is no workspace
        sizes = cpu_events.sizes(lambda: returned.append(func(*operands, **named)))
    live = [0, *accumulate(sizes)]
    return max(live) - live[-1]  # at the end only the returned tensors are live
