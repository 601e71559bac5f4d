"""The Triton kernels compiled for GPUs that need not be there: registers do not spill, 16-bit runs on tensor cores.

The setting is the source document's: N=196, M=64, D=256. What is compiled is what `triton.tiles` chooses, by the Triton
that is installed; `tests/null_gpu/test_cards.py` runs these tests with the one that PyTorch for GPUs brings.
"""

import re
import subprocess
import tempfile
from itertools import product
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not installed: pip install 'ds-cmli[test]'")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from ds_cmli.cmli.backends import unsuited  # noqa: E402
from ds_cmli.cmli.triton.backward_kernel import gradient_kernel  # noqa: E402
from ds_cmli.cmli.triton.forward_kernel import forward_kernel  # noqa: E402
from ds_cmli.cmli.triton.gradient import CHUNK, LONGEST, SEGMENTS, SPARSE, Lists, sparse_features  # noqa: E402
from ds_cmli.cmli.triton.sparse_kernels import pairs_kernel, sort_kernel, sparse_gradient_kernel  # noqa: E402
from ds_cmli.cmli.triton.tiles import (  # noqa: E402
    BLOCK,
    backward_tiles,
    forward_tiles,
    kept_tiles_kernel,
)

# Bytes a block may use (CUDA C++ Programming Guide).
SHARED = {75: 64, 80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
SHARED = {target: kilobytes * 1024 for target, kilobytes in SHARED.items()}
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
CASES = [(target, dtype) for target in (80, 90) for dtype in NAMES] + [(86, torch.bfloat16)]
# A few bytes, or of a kernel that is new: sm_90 in fp32 by Triton 3.7, sm_100 by Triton 3.9.
SPILLS = {(90, torch.float32): 24} | {(100, dtype): 512 for dtype in NAMES}
DENSE_SPILLS = SPILLS | {(90, torch.bfloat16): 48}  # with fewer features, twice the instructions and no spills
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
    matches = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage.stdout + usage.stderr)}
    return matches["REG"], matches["STACK"] + matches["LOCAL"], result.metadata.shared, result.asm["ptx"]


def check(registers, spills, shared, ptx, target, dtype, allowed=SPILLS):
    assert spills <= allowed.get((target, dtype), 0), f"{registers} registers and {spills} bytes spilled"
    assert shared <= SHARED[target]
    if dtype.itemsize == 2:
        assert PRODUCTS.get(target, "mma.sync") in ptx
    else:
        assert "fma.rn.f32" in ptx and "tf32" not in ptx


def forward_kernels(target, dtype, variants, both=True):
    """What `compiled` gives of each tile width and each (masked, save) of `variants`, of one direction or both."""
    tiles = forward_tiles(N, M, D, dtype, divmod(target, 10), SHARED[target])
    pointers = dict.fromkeys(("s_i2t", "s_t2i"), "fp32") | dict.fromkeys(("image", "text"), NAMES[dtype])
    pointers |= dict.fromkeys(("arg_i2t", "arg_t2i"), "u8") | dict.fromkeys(("image_mask", "token_mask"), "i16")
    pointers |= dict.fromkeys(("image_count", "text_count", "first", "code"), "i32") | {"suspect": "i32"}
    for tokens, (masked, save) in product(tiles.tokens, variants):
        constants = {"D": D, "ROWS": tiles.rows, "TOKENS": tokens, "BD": tiles.features, "BLOCKS": -(-N // tiles.rows)}
        constants |= {"MASKED": masked, "SAVE": save, "STAGES": tiles.stages, "BOTH": both}
        yield compiled(forward_kernel, pointers, constants, target, tiles)


def backward_kernels(target, dtype, variants, wins=(True, True)):
    """What `compiled` gives of each (P masked, Q masked) of `variants`, where P, Q or both win positions."""
    pointers = dict.fromkeys(("out", "source"), NAMES[dtype]) | dict.fromkeys(("p_win", "q_win"), "u8")
    pointers |= dict.fromkeys(("p_mask", "q_mask"), "i16")
    pointers |= dict.fromkeys(("scale", "p_grad", "q_weight"), "fp32") | {"p_count": "i32"}
    pointers |= {f"{list_}_{part}": "i32" for list_ in ("p", "long", "short") for part in ("code", "first")}
    pointers["sparse"] = "i32"
    for p_masked, q_masked in variants:
        tiles = backward_tiles(D, dtype, divmod(target, 10), N if p_masked else M)
        constants = {"D": D, "BD": tiles.features, "ROWS": tiles.rows, "LONG": tiles.step, "P_MASKED": p_masked}
        constants |= {"Q_MASKED": q_masked, "TWO_TERMS": dtype == torch.bfloat16, "STAGES": tiles.stages}
        constants |= {"P_WINS": wins[0], "Q_WINS": wins[1]}
        yield compiled(gradient_kernel, pointers, constants, target, tiles)


def sparse_kernels(target, dtype, wins=(True, True)):
    """What `compiled` gives of the sparse gradient kernel for d_image and d_text."""
    pointers = dict.fromkeys(("out", "source"), NAMES[dtype]) | {"p_win": "u8", "p_mask": "i16"}
    pointers |= dict.fromkeys(("scale", "p_weight", "q_weight"), "fp32")
    pointers |= dict.fromkeys(("sparse", "p_ends", "kept", "kept_count", "lists", "starts"), "i32")
    for length, p_masked in ((N, False), (M, True)):
        constants = {"D": D, "BD": sparse_features(D, dtype), "P_MASKED": p_masked}
        constants |= {"P_WINS": wins[0], "Q_WINS": wins[1]}
        constants |= {name: SPARSE[name] for name in ("STEP", "UNROLL")}
        constants |= {"TILES": Lists.of((1, length), (1, M), 1).tiles, "TWO_TERMS": dtype == torch.bfloat16}
        yield compiled(sparse_gradient_kernel, pointers, constants, target, Warps(4, 2))


def sorting_kernels(target, length=N):
    """What `compiled` gives of the kernels that list tiles, pairs and positions, for images of so many patches."""
    kept = dict.fromkeys(("out_code", "out_first", "code", "first"), "i32") | {"kept": "u8"}
    yield compiled(kept_tiles_kernel, kept, {"WIDTH": BLOCK}, target, Warps(4))
    lists = Lists.of((1, length), (1, M), 1)
    floats = dict.fromkeys(("scale", "p_weight", "q_weight", "p_grad", "q_grad"), "fp32")
    integers = dict.fromkeys(("kept", "kept_count", "p_count", "q_count"), "i32")
    yield compiled(pairs_kernel, floats | integers, {"WIDTH": CHUNK}, target, Warps(4))
    integers |= dict.fromkeys(("counts", "lists", "starts", "sparse"), "i32") | {"q_win": "u8", "q_mask": "i16"}
    for fill in (False, True):
        constants = {"FILL": fill, "SEGMENTS": SEGMENTS, "TILES": lists.tiles, "WIDTH": lists.width, "MASKED": True}
        yield compiled(sort_kernel, integers, constants, target, Warps(1))


class Warps(NamedTuple):
    warps: int
    stages: int = 3


def suited(target):
    return unsuited(divmod(target, 10), triton.__version__) is None


@pytest.mark.parametrize(("target", "dtype"), CASES, ids=str)
def test_forward(target, dtype):
    if not suited(target):
        pytest.skip("the kernels do not run there")
    # Without argmax indices, and without image masks in fp16, the kernels are parts of these.
    variants = ((False, True), (True, True))[: 2 if dtype == torch.bfloat16 else 1]
    for entry in forward_kernels(target, dtype, variants):
        check(*entry, target, dtype)
    tiles = forward_tiles(N, M, D, dtype, divmod(target, 10), SHARED[target])
    assert max(tiles.tokens) >= 32
    assert dtype.itemsize > 2 or SHARED[target] < 128 * 1024 or tiles.rows >= N


@pytest.mark.parametrize(("target", "dtype"), CASES, ids=str)
def test_backward(target, dtype):
    if not suited(target):
        pytest.skip("the kernels do not run there")
    for entry in backward_kernels(target, dtype, ((False, True), (True, False))):  # d_image, d_text
        check(*entry, target, dtype, DENSE_SPILLS)


@pytest.mark.parametrize(("target", "dtype"), CASES, ids=str)
def test_sparse_backward(target, dtype):
    if not suited(target):
        pytest.skip("the kernels do not run there")
    for registers, spills, shared, ptx in sparse_kernels(target, dtype):
        assert spills == 0 and registers <= 168  # three programs of four warps share a multiprocessor
        assert shared <= SHARED[target]
        assert ("mma.sync" in ptx) is (dtype.itemsize == 2) and "tf32" not in ptx and "atom" not in ptx
    for registers, spills, _, ptx in sorting_kernels(target):
        assert spills == 0 and registers <= 128 and "atom" not in ptx


@pytest.mark.slow
@pytest.mark.parametrize(("target", "dtype"), CASES, ids=str)
def test_one_direction(target, dtype):
    """No more registers and shared memory than both directions take, and spills only where they spill."""
    if not suited(target):
        pytest.skip("the kernels do not run there")
    ways = [forward_kernels(target, dtype, [(True, True)], both) for both in (False, True)]
    for (registers, spills, shared, ptx), whole in zip(*ways, strict=True):
        check(registers, spills, shared, ptx, target, dtype)
        assert registers <= whole[0] + 8 and shared <= whole[2]
    for wins in ((True, False), (False, True)):  # the gradient of queries, which have a mask, and of documents
        for entry in backward_kernels(target, dtype, [wins], wins):
            check(*entry, target, dtype, DENSE_SPILLS | {(90, torch.bfloat16): 72})
        for registers, spills, shared, ptx in sparse_kernels(target, dtype, wins):
            assert spills == 0 and registers <= 168 and shared <= SHARED[target]
            assert "tf32" not in ptx and "atom" not in ptx
    for registers, spills, *_ in sorting_kernels(target, LONGEST):
        assert spills == 0 and registers <= 168


@pytest.mark.parametrize("target", [75, 100])
def test_the_kernels_run_where_they_are_said_to(target):
    try:
        _, _, shared, _ = next(forward_kernels(target, torch.float16, [(False, True)]))
        runs = shared <= SHARED[target]
    except RuntimeError:
        runs = False
    *_, ptx = next(backward_kernels(target, torch.float32, [(False, True)]))
    assert suited(target) is (runs and "tf32" not in ptx)
