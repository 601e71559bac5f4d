"""The Triton kernels compiled for GPUs that need not be there: registers do not spill, 16-bit runs on tensor cores.

The sizes are the source document's: N=196, M=64, D=256.
"""

import re
import subprocess
import tempfile
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not installed: pip install 'ds-cmli[test]'")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from ds_cmli.cmli.triton_backward import backward_tiles, gradient_kernel, two_terms  # noqa: E402
from ds_cmli.cmli.triton_forward import forward_kernel, forward_tiles, unsuited  # noqa: E402

# KB that a block may use (CUDA C++ Programming Guide).
SHARED = {80: 163, 86: 99, 90: 227, 100: 227}
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
CASES = [(80, torch.bfloat16), (90, torch.float16)]
SLOW = [(86, torch.float16), (90, torch.bfloat16), (90, torch.float32), (100, torch.bfloat16)]
CASES += [pytest.param(*case, marks=pytest.mark.slow) for case in SLOW]
SPILLS = {(90, torch.bfloat16): 48} | {(100, dtype): 512 for dtype in NAMES}  # bytes; sm_100 is new
PRODUCTS = {90: "wgmma.mma_async", 100: "tcgen05.mma"}
N, M, D = 196, 64, 256


def compiled(kernel, pointers, constants, target, tiles):
    """(registers, bytes of stack and spills, bytes of shared memory, PTX) of one kernel."""
    signature = {}
    for name in kernel.arg_names:
        signature[name] = "constexpr" if name in constants else "*" + pointers[name] if name in pointers else "i32"
    # As at a launch: PyTorch aligns tensors to 16 bytes.
    aligned = {(k,): [["tt.divisibility", 16]] for k, type_ in enumerate(signature.values()) if type_[0] == "*"}
    source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=aligned)
    options = {"num_warps": tiles.warps, "num_stages": tiles.stages}
    result = triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(result.asm["cubin"])
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True)
    found = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage.stdout + usage.stderr)}
    return found["REG"], found["STACK"] + found["LOCAL"], result.metadata.shared, result.asm["ptx"]


def forward_kernels(target, dtype):
    tiles = forward_tiles(N, M, D, dtype, divmod(target, 10), SHARED[target] * 1024)
    pointers = dict.fromkeys(("s_i2t", "s_t2i"), "fp32") | dict.fromkeys(("image", "text"), NAMES[dtype])
    pointers |= dict.fromkeys(("arg_i2t", "arg_t2i"), "u8") | dict.fromkeys(("image_mask", "token_mask"), "i16")
    pointers |= dict.fromkeys(("image_count", "text_count", "first", "code"), "i32") | {"suspect": "i1"}
    for tokens in tiles.tokens:
        constants = {"D": D, "ROWS": tiles.rows, "TOKENS": tokens, "BD": tiles.features, "BLOCKS": -(-N // tiles.rows)}
        constants |= {"MASKED": False, "SAVE": True, "STAGES": tiles.stages, "TEXTS": 64}
        yield compiled(forward_kernel, pointers, constants, target, tiles)


def backward_kernels(target, dtype):
    pointers = dict.fromkeys(("out", "source"), NAMES[dtype]) | dict.fromkeys(("p_win", "q_win"), "u8")
    pointers |= dict.fromkeys(("p_mask", "q_mask"), "i16") | {"p_count": "i32"}
    pointers |= dict.fromkeys(("scale", "p_grad", "q_weight"), "fp32")
    pointers |= {f"{part}_{what}": "i32" for part in ("p", "long", "short") for what in ("code", "first")}
    for of_text in (False, True):
        tiles = backward_tiles(D, dtype, divmod(target, 10), N if of_text else M)
        constants = {"D": D, "BD": tiles.features, "ROWS": tiles.rows, "LONG": tiles.step, "P_MASKED": of_text}
        constants |= {
            "Q_MASKED": not of_text,
            "TWO_TERMS": two_terms(dtype, divmod(target, 10)),
            "STAGES": tiles.stages,
        }
        yield compiled(gradient_kernel, pointers, constants, target, tiles)


@pytest.mark.parametrize("target, dtype", CASES)
def test_kernels_fit_and_use_tensor_cores(target, dtype):
    if unsuited(divmod(target, 10)) is not None:
        pytest.skip(unsuited(divmod(target, 10)))
    for registers, spills, shared, ptx in (*forward_kernels(target, dtype), *backward_kernels(target, dtype)):
        assert spills <= SPILLS.get((target, dtype), 0), f"{registers} registers and {spills} bytes spilled"
        assert shared <= SHARED[target] * 1024
        if dtype.itemsize == 2:
            assert PRODUCTS.get(target, "mma.sync") in ptx
        else:
            assert "fma.rn.f32" in ptx and "tf32" not in ptx


@pytest.mark.parametrize(
    "capability, version, reason",
    [((7, 5), "3.9.0", "8.0 or later"), ((10, 0), "3.8.0", "TF32"), ((10, 0), "3.9.0", None), ((9, 0), "3.6.0", None)],
)
def test_gpus_that_do_not_run_the_kernels_are_known(monkeypatch, capability, version, reason):
    monkeypatch.setattr(triton, "__version__", version)
    found = unsuited(capability)
    assert found is None if reason is None else reason in found
