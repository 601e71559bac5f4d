"""The Triton kernels compiled for GPUs that need not be there: registers do not spill, 16-bit runs on tensor cores.

The setting is the source document's: N=196, M=64, D=256. What is compiled is what `triton.tiles` chooses.
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

from ds_cmli.cmli.triton.backward_kernel import gradient_kernel  # noqa: E402
from ds_cmli.cmli.triton.forward_kernel import forward_kernel  # noqa: E402
from ds_cmli.cmli.triton.tiles import backward_tiles, forward_tiles  # noqa: E402

SHARED = {80: 163 * 1024, 86: 99 * 1024, 90: 227 * 1024}  # bytes a block may use (CUDA C++ Programming Guide)
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
CASES = [(target, dtype) for target in (80, 90) for dtype in NAMES] + [(86, torch.bfloat16)]
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


def check(registers, spills, shared, ptx, target, dtype):
    assert spills == 0, f"{registers} registers and {spills} bytes spilled"
    assert shared <= SHARED[target]
    if dtype.itemsize == 2:
        assert ("wgmma.mma_async" if target == 90 else "mma.sync") in ptx
    else:
        assert "fma.rn.f32" in ptx and "tf32" not in ptx


@pytest.mark.parametrize(("target", "dtype"), CASES, ids=str)
def test_forward(target, dtype):
    tiles = forward_tiles(N, M, D, dtype, divmod(target, 10), SHARED[target])
    blocks = -(-N // tiles.rows)
    pointers = dict.fromkeys(("s_i2t", "s_t2i"), "fp32") | dict.fromkeys(("image", "text"), NAMES[dtype])
    pointers |= dict.fromkeys(("arg_i2t", "arg_t2i"), "u8") | dict.fromkeys(("image_mask", "token_mask"), "i16")
    pointers |= dict.fromkeys(("image_count", "text_count", "first", "code"), "i32") | {"suspect": "i1"}
    for tokens in tiles.tokens:
        # Without argmax indices, and without image masks in fp16, the kernels are parts of these.
        for masked, save in ((False, True), (True, True))[: 2 if dtype == torch.bfloat16 else 1]:
            constants = {"D": D, "ROWS": tiles.rows, "TOKENS": tokens, "BD": tiles.features, "BLOCKS": blocks}
            constants |= {"MASKED": masked, "SAVE": save, "STAGES": tiles.stages}
            check(*compiled(forward_kernel, pointers, constants, target, tiles), target, dtype)
    assert max(tiles.tokens) >= 32
    assert dtype.itemsize > 2 or target == 86 or blocks == 1


@pytest.mark.parametrize(("target", "dtype"), CASES, ids=str)
def test_backward(target, dtype):
    tiles = backward_tiles(D, dtype)
    pointers = dict.fromkeys(("out", "source"), NAMES[dtype]) | dict.fromkeys(("p_win", "q_win"), "u8")
    pointers |= dict.fromkeys(("p_mask", "q_mask"), "i16")
    pointers |= dict.fromkeys(("p_inverse", "q_inverse", "scale", "p_grad", "q_grad"), "fp32")
    pointers |= {f"{list_}_{part}": "i32" for list_ in ("p", "long", "short") for part in ("code", "first")}
    for p_masked, q_masked in ((False, True), (True, False)):  # d_image, d_text
        constants = {"D": D, "BD": tiles.features, "ROWS": tiles.rows, "LONG": tiles.step, "P_MASKED": p_masked}
        constants |= {"Q_MASKED": q_masked, "TWO_TERMS": dtype == torch.bfloat16, "STAGES": tiles.stages}
        check(*compiled(gradient_kernel, pointers, constants, target, tiles), target, dtype)
