"""DeepSpeed's own optimizers without their kernels, which it compiles at the first use.

The kernels update parameters and states in place and allocate nothing.
"""

import sys
from collections.abc import Callable
from contextlib import ExitStack

from ds_cmli.common.patches import patched

IN_PLACE = ("fused_adam", "fused_lion", "cpu_adam", "cpu_lion", "cpu_adagrad")


class _Kernels:
    """A compiled module whose functions do nothing."""

    def __getattr__(self, name: str) -> Callable[..., int]:
        return lambda *_, **__: 0


def leave_out(stack: ExitStack) -> None:
    """Compile none of these kernels until `stack` ends, if the program has imported DeepSpeed."""
    if "deepspeed" in sys.modules:
        stack.enter_context(patched("deepspeed: kernels", _loading))


def _loading(load: Callable) -> Callable:
    def run(self, verbose: bool = False) -> object:
        return _Kernels() if self.name in IN_PLACE else load(self, verbose)

    return run
