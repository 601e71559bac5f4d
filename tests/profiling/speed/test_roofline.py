"""The roofline of the op's kernels: instructions of a listing counted by hand, times by hand, and one table."""

import pytest

pytest.importorskip("triton", reason="triton is not installed: pip install 'ds-cmli[test]'")

from ds_cmli.cmli.triton.backend import Sizes
from profiling.speed.gpu_rates import GPUS, Work, at_limits, rates_of
from profiling.speed.instructions import Machine
from profiling.speed.kernel_work import Kernels
from profiling.speed.roofline import ONE_WAY, SIZES, bare_product, materialised, row

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


BRANCHES = """
.L_x_0:
        /*0000*/               @P0 BRA `(.L_x_2) ;
        /*0010*/               @P1 BRA `(.L_x_1) ;
        /*0020*/                   FSETP.NAN.AND P2, PT, R2, R2, PT ;
        /*0030*/                   SEL R4, R4, R5, P2 ;
.L_x_1:
        /*0040*/                   FADD R3, R2, R3 ;
        /*0050*/               @P3 BRA `(.L_x_0) ;
.L_x_2:
        /*0060*/                   EXIT ;
"""


def test_what_a_branch_skips_by_hand():
    machine = Machine.parse(BRANCHES)
    assert machine.branches == [(1, 5), (2, 3)] and machine.loops == [(0, 5)]
    rare = machine.without(".NAN")  # of the two branches around it, the inner one
    assert len(rare.instructions) == 5 and rare.loops == [(0, 3)]
    assert rare.executed([10]) == 1 + 4 * 10
    assert machine.without("HMMA").executed([10]) == machine.executed([10]) == 1 + 6 * 10


def test_gpus_by_the_names_that_predictions_take():
    assert rates_of("NVIDIA A100 80GB") == GPUS["a100"] and rates_of("RTX 3090 24GB") == GPUS["rtx3090"]
    assert rates_of("T4 16GB") is None


def test_times_by_hand():
    a100 = GPUS["a100"]
    product = bare_product(SIZES, 512 * 62)
    assert product.flops == 2 * 256 * 196 * 512 * 62 * 256
    assert max(product.times(a100).values()) == pytest.approx(1e3 * product.flops / 312e12)
    two = row("two", [Work(312e9, 0, 0), Work(0, 2039e6 * 3, 4.5e9)], a100, 0.5)
    assert two["ms at the limits"] == pytest.approx(1 + 3) and two["ms"] == pytest.approx(8)
    assert two["binds"] == "DRAM" and at_limits([Work(312e9, 0, 0)] * 2, a100) == pytest.approx(2)
    # 14 times the similarities of the document's block row in 16 bits, 3.29 GB.
    assert sum(work.dram for work in materialised(SIZES)) == 14 * 256 * 512 * 196 * 64 * 2


def test_what_the_kernels_take_on_one_gpu():
    a100 = GPUS["a100"]
    kernels = Kernels(a100, "bf16", SIZES, [62] * 512)
    dense, sparse, few = kernels.dense(True), kernels.sparse(True), kernels.sparse(True, 0.03)
    assert dense.flops == 2 * 2 * 256 * 208 * 512 * 64 * 256  # two terms; rows in tiles of 16, texts in steps of 32
    assert 0.3 < sparse.instructions / dense.instructions < 0.6
    assert few.instructions < sparse.instructions / 5
    assert sum(work.l2 for work in kernels.backward(1.0)) == sparse.l2 + kernels.sparse(False).l2
    indices, scores = kernels.forward(), kernels.forward(indices=False)
    assert indices.flops == scores.flops and scores.instructions < 0.8 * indices.instructions
    assert indices.dram - scores.dram == indices.l2 - scores.l2 == 256 * 512 * (196 + 64)  # bytes of the indices
    captions = Kernels(a100, "bf16", SIZES, {10: 512})
    assert [work.flops for work in captions.backward(1.0)] == [captions.dense(side).flops for side in (True, False)]


def test_one_direction_by_hand():
    sizes = ONE_WAY["colpali"]
    similarities = 128 * 128 * 1030 * 32
    # Written, read twice by products; read for the maxima, filled with zeros for their gradients.
    assert sum(work.dram for work in materialised(sizes, 2)) == 5 * similarities * 2
    kernels = Kernels(GPUS["a100"], "bf16", sizes, [32] * 128, one_way=True)
    assert kernels.pair_bytes == kernels.token_bytes == 32 * 2  # in 16 bits, for over 256 positions
    assert kernels.wins(True) == {"P_WINS": False, "Q_WINS": True}  # tokens alone win


@pytest.mark.slow
def test_one_direction_takes_less():
    sizes = Sizes(64, 64, 180, 32, 128)
    both, one = (Kernels(GPUS["a100"], "bf16", sizes, [32] * 64, one_way) for one_way in (False, True))
    for of in (lambda k: k.forward(), lambda k: k.dense(True), lambda k: k.sparse(True), lambda k: k.sparse(False)):
        assert of(one).instructions < of(both).instructions and of(one).l2 < of(both).l2
    assert one.forward().flops == both.forward().flops
    pages = Kernels(GPUS["a100"], "bf16", ONE_WAY["colpali"], [32] * 128, one_way=True)
    assert pages.sparse(True).instructions < pages.dense(True).instructions / 5


def test_twice_the_texts_take_twice_the_work():
    once, twice = (Kernels(GPUS["a100"], "fp16", Sizes(64, J, 49, 32, 256), {32: J}) for J in (512, 1024))
    for of in (lambda k: k.forward(), lambda k: k.dense(True), lambda k: k.sparse(True, 0.1)):
        assert of(twice).instructions == pytest.approx(2 * of(once).instructions, rel=0.05)
    # 2^27 entries do not fit the lists: the dense kernel runs.
    many = Kernels(GPUS["a100"], "fp16", Sizes(64, 2**22, 49, 32, 256), {32: 2**22})
    assert many.sparse(True) is None and many.backward()[0].flops == many.dense(True).flops
