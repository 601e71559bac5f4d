"""Triton's kernels by its interpreter, for which a variable must be set before triton is imported: this file in a
process of its own. What threads do to each other on a GPU it does not show.
"""

import os
import subprocess
import sys
from functools import partial

import pytest

CASES = 8  # of seconds each; 100 with -m slow


def run(count: int) -> None:
    pytest.importorskip("triton")
    env = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, __file__, str(count)], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_random_cases():
    run(CASES)


@pytest.mark.slow
def test_100_random_cases():
    run(100)


def main(count: int) -> None:
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    from ds_cmli.cmli import cmli_scores
    from tests.cmli.cases import case, check

    real = interpreter.InterpreterBuilder.create_dot

    def create_dot(self, a, b, *others):
        """The interpreter multiplies the bits of bf16 as integers."""

        def wide(x):
            if x.dtype.scalar != tl.bfloat16:
                return x
            return interpreter.TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

        return real(self, wide(a), wide(b), *others)

    interpreter.InterpreterBuilder.create_dot = create_dot
    for seed in range(count):
        check(partial(cmli_scores, backend="triton"), case(seed, longest=70))


if __name__ == "__main__":
    main(int(sys.argv[1]))
