"""What other packages' kernels take: amounts by hand, and what is said of a package that is not there."""

from importlib.util import find_spec

import pytest

pytest.importorskip("triton", reason="triton is not installed: pip install 'ds-cmli[test]'")

from ds_cmli.cmli.triton.backend import Sizes
from profiling.speed.gpu_rates import GPUS
from profiling.speed.instructions import Machine
from profiling.speed.peers import Direction, steps


def test_a_gather_with_atomic_additions_by_hand():
    direction = Direction(GPUS["a100"], "bf16", P=3, L=5, Q=7, K=11, D=16, valid=15)
    # Ten instructions before a loop of four, which turns once for each of Q; two warps for each of 15 positions.
    work = direction.atomic(Machine([""] * 14, [(10, 13)], []), 2, 15)
    assert work.instructions == 2 * 15 * (10 + 4 * 7)
    assert work.l2 == 15 * 7 * 16 * (2 + 4)  # a row of 16 bits is read, one of fp32 added
    assert work.dram == 2 * (2 * 16 * (3 * 5 + 7 * 11)) + 4 * 15 * 7 + 8 * 7 * 11 * 16


def test_the_stride_of_a_last_axis():
    names = ["Q_ptr", "stride_q_n", "stride_q_l", "stride_q_d", "stride_s_n", "stride_s_b", "shared_docs"]
    assert [name for name in names[1:-1] if Direction.is_last(name, names)] == ["stride_q_d", "stride_s_b"]


def test_packages_that_are_missing_are_left_out(capsys):
    if find_spec("flash_maxsim") or find_spec("late_interaction_kernels"):
        pytest.skip("they are installed")
    assert steps(GPUS["a100"], "bf16", Sizes(2, 2, 4, 4, 16), 8) == {}
    assert capsys.readouterr().out.splitlines() == [
        "late-interaction-kernels is not installed: left out", "flash-maxsim is not installed: left out"
    ]  # fmt: skip
