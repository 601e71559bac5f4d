"""The roofline of the op's kernels: instructions of a listing counted by hand, times by hand, and one table."""

import pytest

pytest.importorskip("triton", reason="triton is not installed: pip install 'ds-cmli[test]'")

from profiling.instructions import Machine
from profiling.roofline import GPUS, Kernels, Work, bare_product, materialised, row

LISTING = """
.text.kernel:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_1:
        /*0010*/                   LDG.E R2, [R4.64] ;
.L_x_0:
        /*0020*/                   FFMA R3, R2, R2, R3 ;
        /*0030*/              @!P0 BRA `(.L_x_0) ;
        /*0040*/               @P1 BRA `(.L_x_1) ;
        /*0050*/                   EXIT ;
.L_x_2:
        /*0060*/                   BRA `(.L_x_2);
"""


def test_loops_by_hand():
    machine = Machine.parse(LISTING)
    assert len(machine.instructions) == 7
    assert machine.loops == [(1, 4), (2, 3)]  # the last branch only ends the program
    # Outside 3; the outer loop's own 2, ten times; the inner one's 2, thirty times.
    assert machine.executed([10, 3]) == 3 + 2 * 10 + 2 * 30
    with pytest.raises(ValueError, match="2 loops, 1 numbers of trips"):
        machine.executed([10])


def test_times_by_hand():
    a100 = GPUS["a100"]
    product = bare_product(512 * 62)
    assert product.flops == 2 * 256 * 196 * 512 * 62 * 256
    assert max(product.times(a100).values()) == pytest.approx(1e3 * product.flops / 312e12)
    two = row("two", [Work(312e9, 0, 0), Work(0, 2039e6 * 3, 4.5e9)], a100, 0.5)
    assert two["ms at the limits"] == pytest.approx(1 + 3) and two["ms"] == pytest.approx(8)
    assert two["binds"] == "DRAM"
    # 14 times the similarities of the document's block row in 16 bits, 3.29 GB.
    assert sum(work.dram for work in materialised()) == 14 * 256 * 512 * 196 * 64 * 2


def test_what_the_kernels_take_on_one_gpu():
    a100 = GPUS["a100"]
    kernels = Kernels(a100, "bf16", [62] * 512)
    dense, sparse, few = kernels.dense(True), kernels.sparse(True), kernels.sparse(True, 0.03)
    assert dense.flops == 2 * 2 * 256 * 208 * 512 * 64 * 256  # two terms; rows in tiles of 16, texts in steps of 32
    assert 0.3 < sparse.instructions / dense.instructions < 0.6
    assert few.instructions < sparse.instructions / 10
    assert sum(work.l2 for work in kernels.backward(1.0)) == sparse.l2 + kernels.sparse(False).l2
    captions = Kernels(a100, "bf16", [10] * 512)
    assert [work.flops for work in captions.backward(1.0)] == [captions.dense(side).flops for side in (True, False)]
