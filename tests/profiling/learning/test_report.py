"""The table and the pictures, from lines that are there."""

import pytest

from ds_cmli.common.errors import UserError
from profiling.learning.pictures import draw_column, draw_differences
from profiling.learning.plan import Arm, Contrast, Plan
from profiling.learning.report import (
    arms_table,
    by_scene,
    chance,
    compare,
    contrasts_table,
    power_table,
    runs_table,
    secondary_table,
    split_tables,
)

ENDPOINT = "eval/seen/combined/mean_recall"
BASE = [0.4, 0.5, 0.6]


def plan(*contrasts: Contrast) -> Plan:
    arms = {name: Arm(name, {}, [0, 1, 2]) for name in ("base", "near", "far", "new")}
    return Plan("tiny", arms, [ENDPOINT], list(contrasts))


def lines(**arms: list[float]) -> dict:
    every = [(arm, seed, value) for arm, values in arms.items() for seed, value in enumerate(values)]
    return {(arm, seed): {ENDPOINT: repr(value)} for arm, seed, value in every}


NEAR = Contrast("near", "base", True, 0.01)
FAR = Contrast("far", "base", True)
NEW = Contrast("new", "base", True)
BESIDE = Contrast("far", "near")
FOUND = lines(base=BASE, near=[0.401, 0.5, 0.599], far=[0.5, 0.6, 0.701], new=[0.7])


def test_a_table_of_arms():
    table = arms_table(plan(), FOUND, [ENDPOINT])
    # The deviation of 0.4, 0.5 and 0.6 is 0.1.
    assert table.rows[0] == ["chance", "", "-"]
    assert table.rows[1] == ["base", "3 of 3", "0.5000 ± 0.0577"]
    assert table.rows[4] == ["new", "1 of 3", "0.7000"]


def test_chance_is_that_of_the_number_of_scenes():
    by_name = {("base", 0): {"unseen/hits": "0" * 600, "seen/hits": "0" * 4}}
    assert chance(by_name, "unseen/mean_recall") == pytest.approx(16 / 1800)
    assert chance(by_name, "seen/mean_recall") == pytest.approx((1 / 4 + 1 + 1) / 3)
    assert chance(by_name, "swap/pictures") == 0.5 and chance(by_name, "probe/accuracy") is None


def test_secondary_endpoints_are_described_and_not_tested():
    described = Plan("tiny", plan().arms, ["unseen/mean_recall"], [FAR, NEW], [ENDPOINT])
    table = secondary_table(described, FOUND)
    # The differences are 0.1, 0.1 and 0.101.
    assert table.rows == [["far - base", "+0.1003 ± 0.0003"], ["new - base", "+0.3000"]]
    assert {one.endpoint for one in compare(described, FOUND)} == {"unseen/mean_recall"}
    assert described.measured == ["unseen/mean_recall", ENDPOINT]


def test_contrasts_are_paired_and_corrected():
    near, far, new, beside = compare(plan(NEAR, FAR, NEW, BESIDE), FOUND)
    assert near.by_seed == pytest.approx({0: 0.001, 1: 0.0, 2: -0.001}, abs=1e-12)
    # Three are planned, one of them with a single seed, which counts with p = 1; the fourth is a family of its own.
    assert far.adjusted == pytest.approx(3 * far.found.p) and near.adjusted == pytest.approx(2 * near.found.p)
    assert new.found is None and new.adjusted == 1.0 and beside.adjusted == beside.found.p
    table = contrasts_table([near, far, new, beside])
    assert [row[5] for row in table.rows] == ["TOST ±0.01", "paired t", "paired t", "paired t"]
    assert table.rows[1][3].startswith("+0.1003 ± ") and table.rows[2][3:] == ["-", "-", "paired t", "-", "-"]
    assert table.rows[3][-1].endswith(" (exploratory)")
    assert near.finding().startswith(f"near and base are equivalent within 0.01 in {ENDPOINT}: +0.0000 ± 0.0006, n = 3")
    assert far.finding().startswith("far and base are different in")
    assert new.finding().endswith("not enough runs")
    assert table.notes[6:] == [f"exploratory, of 1 in {ENDPOINT}, shown by Holm: far - near"]


def test_contrasts_that_are_not_planned_are_corrected_for_their_number():
    others = [Contrast("near", "base"), Contrast("far", "base"), Contrast("far", "near"), Contrast("new", "base")]
    near, far, beside, new = compare(plan(*others), FOUND)
    p_values = sorted(one.found.p for one in (far, beside))
    assert sorted((far.adjusted, beside.adjusted)) == pytest.approx([4 * p_values[0], 3 * p_values[1]])
    assert near.adjusted == new.adjusted == 1.0


def test_runs_that_were_added_later_are_counted_apart():
    named = f"far - base in {ENDPOINT}"
    columns = {seed: {"in_plan": "yes", "planned": named} for seed in (0, 1)}
    columns[2] = {"in_plan": "no, other seeds", "planned": named}
    by_name = {key: line | columns[key[1]] for key, line in FOUND.items()}
    whole = plan(FAR, NEAR)
    far, near = compare(whole, by_name)
    # NEAR was not planned with this margin when its runs were made.
    assert far.later == {2} and near.later == {0, 1, 2}
    assert [row[2] for row in contrasts_table([far, near]).rows] == ["3, 1 not in the plan", "3, 3 not in the plan"]
    before, after = split_tables(whole, by_name, [far, near])
    assert [row[2] for row in before.rows] == ["2", "0"] and after.rows[0][2] == "1, 1 not in the plan"
    assert split_tables(whole, FOUND, compare(whole, FOUND)) == []
    runs = runs_table(whole, by_name)
    assert runs.rows[0] == ["base", "2 of 3", "-", "-: 3"]
    assert runs.notes[-1] == "in the plan: no, other seeds: base-2, near-2, far-2"


def test_scenes_are_resampled_where_their_hits_are_known():
    endpoint = "unseen/mean_recall"
    by_name = {}
    for seed, (base, near) in enumerate((("0066", "0666"), ("0006", "0066"))):
        for arm, hits in (("base", base), ("near", near)):
            by_name[arm, seed] = {endpoint: repr(sum(map(int, hits)) / 24), "unseen/hits": hits}
    contrast = Contrast("near", "base", True)
    # Scene 1 in the run of seed 0, scene 2 in that of seed 1.
    assert by_scene(by_name, contrast, endpoint, [0, 1]).tolist() == [[0, 1, 0, 0], [0, 0, 1, 0]]
    assert by_scene(by_name, contrast, "swap/captions", [0, 1]) is None
    of_both = Plan("tiny", plan().arms, [endpoint], [contrast])
    (compared,) = compare(of_both, by_name)
    # Both seeds differ by 1/4; which scenes are drawn alone makes the interval.
    low, high = compared.found.interval
    assert compared.found.mean == 0.25 and compared.found.deviation == 0
    assert low == 0 and 0.4 < high <= 0.75


def test_the_power_table_says_how_many_seeds_are_needed():
    table = power_table(compare(plan(NEAR, FAR, NEW), FOUND), 0.002)
    # The deviation of near - base is 0.001: (2.8016 * 0.001 / 0.002)^2 = 1.96, so 2, and two more.
    assert table.rows[0] == ["near - base", ENDPOINT, "3", "0.0010", "4"]
    assert [row[0] for row in table.rows] == ["near - base", "far - base"]


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
