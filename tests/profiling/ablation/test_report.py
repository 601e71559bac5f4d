"""The table and the pictures, from lines that are there."""

import pytest

from ds_cmli.common.errors import UserError
from profiling.ablation.pictures import draw_column, draw_differences
from profiling.ablation.plan import Arm, Contrast, Plan
from profiling.ablation.report import arms_table, compare, contrasts_table

ENDPOINT = "eval/seen/combined/mean_recall"
BASE = [0.4, 0.5, 0.6]


def plan(*contrasts: Contrast) -> Plan:
    arms = {name: Arm(name, {}, [0, 1, 2]) for name in ("base", "near", "far", "new")}
    return Plan("tiny", arms, [10], [ENDPOINT], list(contrasts))


def lines(**arms: list[float]) -> dict:
    every = [(arm, seed, value) for arm, values in arms.items() for seed, value in enumerate(values)]
    return {(arm, seed): {ENDPOINT: repr(value)} for arm, seed, value in every}


NEAR = Contrast("near", "base", True, 0.01)
FAR = Contrast("far", "base", True)
NEW = Contrast("new", "base", True)
BESIDE = Contrast("far", "near")
FOUND = lines(base=BASE, near=[0.401, 0.5, 0.599], far=[0.5, 0.6, 0.701], new=[0.7])


def test_a_table_of_arms():
    table = arms_table(plan(), FOUND)
    # The deviation of 0.4, 0.5 and 0.6 is 0.1.
    assert table.rows[0] == ["base", "3 of 3", "0.5000 ± 0.0577"]
    assert table.rows[3] == ["new", "1 of 3", "0.7000"]
    assert arms_table(plan(), FOUND, tuning=True).rows[0] == ["base", "0 of 1", "-"]


def test_contrasts_are_paired_and_corrected():
    near, far, new, beside = compare(plan(NEAR, FAR, NEW, BESIDE), FOUND)
    assert near.by_seed == pytest.approx({0: 0.001, 1: 0.0, 2: -0.001}, abs=1e-12)
    # Three are planned, one of them with a single seed, which counts with p = 1; that beside them is not corrected.
    assert far.adjusted == pytest.approx(3 * far.found.p) and near.adjusted == pytest.approx(2 * near.found.p)
    assert new.found is None and new.adjusted == 1.0 and beside.adjusted is None
    table = contrasts_table([near, far, new, beside])
    assert [row[5] for row in table.rows] == ["TOST ±0.01", "paired t", "paired t", "paired t"]
    assert table.rows[1][3].startswith("+0.1003 ± ") and table.rows[2][3:] == ["-", "-", "paired t", "-", "-"]
    assert table.rows[3][-1] == "not planned"
    assert near.finding().startswith(f"near and base are equivalent within 0.01 in {ENDPOINT}: +0.0000 ± 0.0006, n = 3")
    assert far.finding().startswith("far and base are different in")
    assert new.finding().endswith("not enough runs")
    assert len(table.notes) == 3 + 3


def test_what_the_numbers_do_not_carry_is_not_said():
    (far,) = compare(plan(Contrast("far", "base", True, 0.01)), FOUND)
    assert far.finding().startswith("far and base are not shown to be equivalent within 0.01 in")
    (near,) = compare(plan(Contrast("near", "base", True)), FOUND)
    assert near.finding().startswith("near and base are not shown to differ in")


def test_pictures(tmp_path):
    pytest.importorskip("matplotlib")
    whole = plan(NEAR, FAR, NEW)
    draw_differences(compare(whole, FOUND), str(tmp_path / "differences.png"))
    assert (tmp_path / "differences.png").stat().st_size > 1000
    with pytest.raises(UserError, match="--curve is 'cut/kept', which no run has logged: no run lies in"):
        draw_column("cut/kept", whole.runs(), tmp_path, str(tmp_path / "curve.png"))
