"""What an operator holds inside, in the order in which it asks the allocator for it."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

HALF = (torch.float16, torch.bfloat16)
# The sizes in bytes of the blocks that an operator holds at one moment, in the order of their
# allocation. Blocks of the stage before it that a stage has too, in their order, stay.
Stage = tuple[int, ...]


class Inside(NamedTuple):
    """The stages of an operator's own blocks; all have been freed when it returns.

    before, after: until its results are allocated, and from then on.
    """

    before: tuple[Stage, ...] = ()
    after: tuple[Stage, ...] = ()


NOTHING = Inside()


def ceil_to(number: int, multiple: int) -> int:
    return math.ceil(number / multiple) * multiple


def accumulate_bytes(dtype: torch.dtype) -> int:
    """Bytes of a sum of this type in PyTorch's kernels (`at::acc_type`, `at::opmath_type`)."""
    return max(4, dtype.itemsize) if dtype.is_floating_point else 8


def contiguous_copies(
    *tensors: Tensor, layout: torch.memory_format = torch.contiguous_format
) -> Stage:
    """What `x.contiguous(memory_format=layout)` of each tensor allocates."""
    stage: Stage = ()
    for x in tensors:
        if not x.is_contiguous(memory_format=layout):
            stage += (x.nbytes,)
    return stage
