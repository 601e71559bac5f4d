"""The settings are many and all different; what is said of each estimator follows from its rows."""

import pytest

from profiling.memory.estimators import (
    DEEPSPEED,
    OURS,
    RULE,
    Row,
    accelerate_estimate,
    deepspeed_estimate,
    draw,
    rounded,
    settings,
    summary,
)  # fmt: skip


def test_at_least_sixty_settings_and_each_its_own_name():
    names = [setting.name() for setting in settings()]
    assert len(names) >= 60 and len(set(names)) == len(names)


def test_the_other_estimators_are_asked():
    # ZeRO-2: 2 B of every parameter, 18 B of a rank's share; ZeRO-3: 4 B of the largest layer, 18 B of a share.
    assert deepspeed_estimate(2, 1000, 100, 4, False) == 2 * 1000 + 18 * 1000 // 4
    assert deepspeed_estimate(3, 1000, 100, 4, False) == 4 * 100 + 18 * 1000 // 4
    # With the optimizer on the host: 16 B of every parameter, and half as much again for buffers, shared by the ranks.
    assert deepspeed_estimate(2, 1000, 100, 4, True) == 2 * 1000 + 24 * 1000 // 4
    assert deepspeed_estimate(3, 1000, 100, 4, True) == 4 * 100 + 2 * 1000 // 4 + 24 * 1000 // 4
    pytest.importorskip("accelerate")
    assert accelerate_estimate(1000, "fp32") == 4 * 4 * 1000  # weights, gradients and Adam's two states
    assert accelerate_estimate(1000, "bf16") == 2 * 4 * 1000


def test_errors_and_failures_are_counted():
    rows = [
        Row("a", 100, {OURS: 100, RULE: 50, DEEPSPEED: 300}, {OURS: False, RULE: True, DEEPSPEED: False}),
        Row("b", 200, {OURS: 200, RULE: 180}, {OURS: False, RULE: True}),
        Row("c", 400, {OURS: 396, RULE: 800}, {OURS: True, RULE: False}),
    ]
    figures = summary(rows)
    assert figures[OURS] == {
        "settings": 3, "median_relative_error": 0.0, "maximum_relative_error": pytest.approx(0.01), "exact": 2,
        "too_low": pytest.approx(1 / 3), "p_oom": pytest.approx(1 / 3),
    }  # fmt: skip
    assert figures[RULE]["median_relative_error"] == pytest.approx(0.5) and figures[RULE]["p_oom"] == pytest.approx(
        2 / 3
    )
    assert figures[RULE]["too_low"] == pytest.approx(2 / 3) and figures[DEEPSPEED]["too_low"] == 0
    assert figures[DEEPSPEED]["settings"] == 1 and figures[DEEPSPEED]["maximum_relative_error"] == pytest.approx(2)


def test_the_picture(tmp_path):
    pytest.importorskip("matplotlib")
    rows = [Row("a", 100, {OURS: 100, RULE: 50}, {OURS: False, RULE: True})]
    draw(summary(rows), tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 1000


def test_errors_are_read_as_percent():
    shares = (0.0, 1e-9, 2.4e-6, 0.0004, 0.467, 1.205)
    assert [rounded(share) for share in shares] == ["0%", "0%", "0.0002%", "0.04%", "46.7%", "120.5%"]
