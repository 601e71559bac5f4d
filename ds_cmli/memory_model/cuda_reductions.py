"""The staging buffers of PyTorch's reductions on CUDA, and what losses hold that are reduced.

A reduction that a block of threads cannot end alone is shared by several blocks, which leave their
partial results in a buffer of the device's memory. How many there are depends on the layout of the
input and on how many threads the GPU runs at a time. Source of all formulas:
aten/src/ATen/native/cuda/Reduce.cuh (`setReduceConfig`, `ReduceConfig::global_memory_size`) and
aten/src/ATen/TensorIterator.cpp (`reorder_dimensions`, `coalesce_dimensions`), as in PyTorch 2.13.

An input of 2 GiB and more is reduced there in parts, but here at once.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch._ops import OpOverload

from ds_cmli.memory_model.gpus import Limits
from ds_cmli.memory_model.inside import HALF, Inside, Stage, accumulate_bytes

aten = torch.ops.aten
# Losses whose result keeps the memory of what they reduce, and the place of the reduction among
# their arguments (aten/src/ATen/native/Loss.cpp).
LOSSES = {
    aten.mse_loss.default: 2,
    aten.smooth_l1_loss.default: 2,
    aten.soft_margin_loss.default: 2,
    aten.binary_cross_entropy.default: 3,
}
MOST_THREADS, WARP = 512, 32  # of a block that reduces
FEWEST_VALUES, MOST_VALUES = 16, 256  # that a thread should add up
SEMAPHORE = 4  # bytes


class Dimension(NamedTuple):
    size: int
    reduced: bool
    stride: int  # of the input, in elements
    out_stride: int  # of the result; 0 where reduced


def _moves_inside(outer: Dimension, inner: Dimension) -> bool | None:
    """Whether `inner` must come before `outer`; None: their order does not matter.

    Reduced dimensions come first, then smaller strides; the result's count before the input's.
    """
    if outer.reduced != inner.reduced:
        return inner.reduced
    for first, second in ((outer.out_stride, inner.out_stride), (outer.stride, inner.stride)):
        if first and second:
            if first != second:
                return first > second
            if outer.size > inner.size:
                return True
    return None


def dimensions(x: Tensor, reduced: Sequence[int]) -> list[Dimension]:
    """The dimensions of a reduction as PyTorch's `TensorIterator` has them, innermost first.

    Args:
        reduced: dimensions of `x`, not negative.
    """
    out, out_stride = [], 1
    for place in reversed(range(x.dim())):
        size, stride = x.shape[place], x.stride(place)
        if place in reduced:
            out.append(Dimension(size, True, stride, 0))
        else:
            out.append(Dimension(size, False, stride, out_stride))
            out_stride *= size
    for last in range(1, len(out)):
        place = last
        for other in reversed(range(last)):
            moves = _moves_inside(out[other], out[place])
            if moves:
                out[other], out[place] = out[place], out[other]
                place = other
            elif moves is False:
                break
    merged: list[Dimension] = []
    for dimension in out:
        if merged and _joins(merged[-1], dimension):
            merged[-1] = _joined(merged[-1], dimension)
        else:
            merged.append(dimension)
    return merged


def _joins(inner: Dimension, outer: Dimension) -> bool:
    if inner.size == 1 or outer.size == 1:
        return True
    strides = inner.size * inner.stride, inner.size * inner.out_stride
    return strides == (outer.stride, outer.out_stride)


def _joined(inner: Dimension, outer: Dimension) -> Dimension:
    if inner.size == 1:
        return outer
    return inner._replace(size=inner.size * outer.size)


def _power_of_two(number: int) -> int:
    """The largest power of two that is not above `number`, at least 1."""
    return 1 << max(0, number.bit_length() - 1)


@dataclass
class _Shares:
    """How a reduction's inputs and outputs are shared among threads (`ReduceConfig`)."""

    inputs: int
    outputs: int
    vector: int = 1  # outputs of a thread
    width: int = 1
    height: int = 1
    input_step: int = 1
    output_step: int = 1

    def set_block(self, inner: int, outer: int) -> None:
        most = MOST_THREADS // self.vector
        wide, high = min(_power_of_two(inner), most), min(_power_of_two(outer), most)
        self.width = min(wide, WARP)
        self.height = min(high, most // self.width)
        self.width = min(wide, most // self.height)

    @property
    def values(self) -> int:
        return math.ceil(self.inputs / self.input_step)

    @property
    def grid(self) -> int:
        return math.ceil(self.outputs // self.vector / self.output_step)


def staging(
    x: Tensor, reduced: Sequence[int], partial_bytes: int, limits: Limits, unroll: int = 4
) -> Stage:
    """The partial results of a reduction, and its semaphores; () if no two blocks share one.

    Args:
        reduced: dimensions of `x`, not negative; none: all.
        partial_bytes: of one partial result.
        unroll: how many values a thread reads at a time (`vt0`).
    """
    if x.numel() < 2:
        return ()
    dims = dimensions(x, reduced or range(x.dim()))
    inner = [dim for dim in dims if dim.reduced and dim.size > 1]
    inputs = math.prod(dim.size for dim in inner)
    shares = _Shares(inputs, x.numel() // inputs)
    count = len(inner)
    along = count == len(dims) or dims[0].stride < dims[count].stride
    if along:
        wide, high, stride = shares.inputs, shares.outputs, dims[0].stride
        if stride == 1 and wide >= 128 and count == 1:
            wide //= unroll
    else:
        wide, high, stride = shares.outputs, shares.inputs, dims[count].stride
        if stride == 1:
            shares.vector = _outputs_together(x, dims, count)
            wide //= shares.vector
    shares.set_block(wide, high)
    if along:
        shares.input_step = shares.width
    else:
        shares.output_step = shares.width
    if shares.values < min(shares.height * 16, MOST_VALUES):
        return ()  # each warp has outputs of its own
    shares.input_step *= shares.height
    blocks = limits.multiprocessors * (limits.threads // (shares.width * shares.height))
    if shares.values < MOST_VALUES or shares.grid > blocks:
        return ()
    enough = min(math.ceil(blocks / shares.grid), math.ceil(shares.values / FEWEST_VALUES))
    parts = max(enough, math.ceil(shares.values / MOST_VALUES))
    if parts == 1:
        return ()
    size = partial_bytes * shares.outputs * parts
    if not along:
        size *= shares.width * shares.vector
    return size, SEMAPHORE * shares.grid


def _outputs_together(x: Tensor, dims: list[Dimension], count: int) -> int:
    """How many outputs a thread may take at a time (`get_output_vec_size`)."""
    together = 4
    others = [dim.stride for place, dim in enumerate(dims) if place != count]
    for number in (int(x.storage_offset()), dims[count].size, *others):
        while number % together:
            together //= 2
    return together


def reduced_dimensions(x: Tensor, dims: int | Sequence[int] | None) -> list[int]:
    """The dimensions that the argument `dim` of a reduction names; None or empty: all."""
    if isinstance(dims, int):
        dims = [dims]
    return sorted(dim % x.dim() for dim in dims) if dims and x.dim() else list(range(x.dim()))


def cast(x: Tensor, dtype: torch.dtype) -> Stage:
    """The copy of `x` in which `sum` and `mean` make their result's type; 16-bit inputs of an fp32
    result are read as they are (`make_reduction_from_out_ty`)."""
    lowered = x.dtype in HALF and dtype == torch.float32
    if x.dtype == dtype or lowered:
        return ()
    return (x.numel() * dtype.itemsize,)


def _is_reduced(args: tuple, place: int) -> bool:
    return len(args) <= place or args[place] != 0


def loss_returned(func: OpOverload, args: tuple, out: object) -> object:
    """What one of `LOSSES` returns, given what it returns without data."""
    if not _is_reduced(args, LOSSES[func]):
        return out
    return (
        args[0].new_empty(torch.broadcast_shapes(args[0].shape, args[1].shape)).as_strided((), ())
    )


def _summed(args: tuple, place: int, limits: Limits) -> Stage:
    """What a loss reduces, and the partial results; () if it returns the loss of each element."""
    if not _is_reduced(args, place):
        return ()
    shape = torch.broadcast_shapes(args[0].shape, args[1].shape)
    sums = torch.empty(shape, dtype=args[0].dtype, device="meta")
    return sums.nbytes, *staging(sums, [], accumulate_bytes(sums.dtype), limits)


def loss(args: tuple, limits: Limits) -> Inside:
    """Loss.cpp (`mse_loss_out`, `smooth_l1_loss_out`)."""
    return Inside(after=(_summed(args, 2, limits),))


def huber_loss(args: tuple, limits: Limits) -> Inside:
    """Loss.cpp (`huber_loss`): what is reduced is there before the result."""
    summed = _summed(args, 2, limits)
    return Inside((summed[:1],), (summed,))


def loss_of_logits(args: tuple, limits: Limits) -> Inside:
    """Loss.cpp (`binary_cross_entropy_with_logits`): the logarithm of the sigmoid as well, and its
    weights where there are some for the positive ones."""
    kept: Stage = (args[0].nbytes,)
    if len(args) > 3 and args[3] is not None:
        kept *= 2
    summed = _summed(args, 4, limits)
    return Inside(((*kept, *summed[:1]),), ((*kept, *summed),))
