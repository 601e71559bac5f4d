"""The Triton kernels interpreted, and compiled for GPUs that need not be there: no registers spill, tensor cores.

The sizes are the source document's, N=196, M=64, D=256, but for M: the longest caption of a batch rarely has 64 tokens.
"""

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not installed: pip install 'ds-cmli[test]'")

from triton.backends.compiler import GPUTarget  # noqa: E402

from ds_cmli.cmli import cmli_scores, op, triton_backward, triton_forward  # noqa: E402

# KB that a block may use (CUDA C++ Programming Guide).
SHARED = {80: 163, 86: 99, 90: 227, 100: 227}
QUICK = [(80, torch.bfloat16), (90, torch.float16)]
SLOW = [(86, torch.float16), (90, torch.bfloat16), (90, torch.float32), (100, torch.bfloat16)]
STARTED = {triton_forward: ["forward_kernel", "combine_kernel"], triton_backward: ["gradient_kernel"]}
SPILLS = {(90, torch.bfloat16): 48} | {(100, torch.bfloat16): 512}  # bytes; sm_100 is new
PRODUCTS = {90: "wgmma.mma_async", 100: "tcgen05.mma"}


def compile_kernels_for(target: int, monkeypatch) -> list:
    """Have kernels compiled for a target, and not started, from now on. Return the list that they come into."""
    kernels: list = []
    gpu = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", target, 32),
        get_current_device=lambda: target,
        get_current_stream=lambda device: 0,
    )
    monkeypatch.setattr(triton.runtime.driver, "_active", gpu)

    class CompiledOnly:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            def compile_kernel(*arguments, **options):
                kernels.append(self.kernel.warmup(*arguments, grid=grid, **options))

            return compile_kernel

    monkeypatch.setattr(op, "INTERPRETED", True)  # the features are on a CPU
    for module, names in STARTED.items():
        monkeypatch.setattr(module, "device_limits", lambda _: (divmod(target, 10), SHARED[target] * 1024))
        for name in names:
            monkeypatch.setattr(module, name, CompiledOnly(getattr(module, name)))
    return kernels


def spilled(kernel, file: Path) -> int:
    """Return the bytes of stack and local memory."""
    file.write_bytes(kernel.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    usage = subprocess.run([tool, "-res-usage", file], capture_output=True, text=True, check=True)
    return sum(map(int, re.findall(r"(?:STACK|LOCAL):(\d+)", usage.stdout + usage.stderr)))


def test_triton_interpreted():
    """Run in another process, because a variable must be set before triton is imported. It shows no races."""
    env = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.cmli.interpreted", *"01234567"]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("target, dtype", [*QUICK, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)])
def test_kernels_fit_and_use_tensor_cores(monkeypatch, tmp_path, target, dtype):
    why_not = triton_forward.why_not_capability(divmod(target, 10))
    if why_not is not None:
        pytest.skip(why_not)
    kernels = compile_kernels_for(target, monkeypatch)
    image, text = (torch.ones(3, length, 256, dtype=dtype, requires_grad=True) for length in (196, 63))
    sum(map(torch.sum, cmli_scores(image, text, torch.ones(3, 63, dtype=torch.bool), backend="triton"))).backward()
    assert len(kernels) >= 4
    for kernel in kernels:
        assert spilled(kernel, tmp_path / "cubin") <= SPILLS.get((target, dtype), 0), kernel.name
        assert kernel.metadata.shared <= SHARED[target] * 1024
        if dtype.itemsize > 2:
            assert "tf32" not in kernel.asm["ptx"]
        elif kernel.name != "combine_kernel":  # which has no products
            assert PRODUCTS.get(target, "mma.sync") in kernel.asm["ptx"]


@pytest.mark.parametrize(
    "D, dtype, target, tiles",
    [
        # 256 patches of 256 features are resident; texts of 64 tokens have registers enough from sm_90 on.
        (256, torch.float16, 80, (256, (16, 32), 256, 8, 2)),
        (256, torch.bfloat16, 90, (256, (16, 32, 64), 256, 8, 2)),
        (256, torch.float16, 86, (128, (16, 32, 64), 256, 8, 2)),
        # More features are taken 64 at a time, fp32 16 at a time.
        (512, torch.float16, 80, (128, (16, 32, 64), 64, 8, 3)),
        (512, torch.float32, 90, (128, (16, 32), 16, 8, 3)),
    ],
)
def test_tiles_are_those_that_were_chosen_by_their_compiled_kernels(D, dtype, target, tiles):
    assert triton_forward.forward_tiles(196, 64, D, dtype, divmod(target, 10), SHARED[target] * 1024) == tiles


@pytest.mark.parametrize(
    "capability, version, reason",
    [((7, 5), "3.9.0", "8.0 or later"), ((10, 0), "3.8.0", "TF32"), ((10, 0), "3.9.0", None), ((9, 0), "3.6.0", None)],
)
def test_gpus_that_do_not_run_the_kernels_are_known(monkeypatch, capability, version, reason):
    monkeypatch.setattr(triton, "__version__", version)
    line = triton_forward.why_not_capability(capability)
    assert line is None if reason is None else reason in line
