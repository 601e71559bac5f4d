"""Kernels that do not run: those of Triton, and those that DeepSpeed compiles for its optimizers.

They write into tensors that they are given and allocate nothing.
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


def leave_out_tritons(stack: ExitStack, replacement: Callable) -> None:
    """Run `replacement` in place of each kernel until `stack` ends, where Triton is installed."""
    if "triton" in sys.modules:  # torch has imported it
        for name in ("triton: kernels", "triton: tuning"):
            stack.enter_context(patched(name, lambda _: replacement))


def leave_out_deepspeeds(stack: ExitStack) -> None:
    """Compile none of these kernels until `stack` ends, if the program has imported DeepSpeed."""
    builder = sys.modules.get("deepspeed.ops.op_builder.builder")
    if builder is not None and builder.OpBuilder.load.__module__ != __name__:
        stack.enter_context(patched("deepspeed: kernels", _loading))


def _loading(load: Callable) -> Callable:
    def run(self, verbose: bool = False) -> object:
        return _Kernels() if self.name in IN_PLACE else load(self, verbose)

    return run
