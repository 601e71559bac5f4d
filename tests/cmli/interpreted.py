"""python -m tests.cmli.interpreted SEED ...: Triton's kernels by its interpreter on random cases."""

import sys
from functools import partial

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

from ds_cmli.cmli import cmli_scores
from tests.cmli.cases import case, check

real = interpreter.InterpreterBuilder.create_dot


def create_dot(self, a, b, *arguments):
    """The interpreter multiplies the bits of bf16 as integers."""

    def wide(x):
        if x.dtype.scalar != tl.bfloat16:
            return x
        return interpreter.TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    return real(self, wide(a), wide(b), *arguments)


interpreter.InterpreterBuilder.create_dot = create_dot
for seed in map(int, sys.argv[1:]):
    check(partial(cmli_scores, backend="triton"), case(seed, longest=70))
# Images of several blocks, with masked patches; and with ties between the blocks.
for seed in (45, 51):
    check(partial(cmli_scores, backend="triton"), case(seed, dtype=torch.float32))
