"""With three values the t distribution has two degrees of freedom, where P(|T| > t) = 1 - t / sqrt(t^2 + 2)."""

from math import sqrt

import numpy as np
import pytest

from profiling.learning.statistics import bootstrap, bootstrap_of_both, difference, holm, runs_needed, t_test, tost


def test_holm_on_four_p_values():
    # Sorted: 0.005 * 4, 0.01 * 3, 0.03 * 2, 0.04 * 1, and none below the one before it.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([]) == []


def test_the_paired_t_test():
    # Mean 2, deviation 1, so t = 2 sqrt(3).
    assert t_test(np.array([1.0, 2.0, 3.0])) == pytest.approx(1 - sqrt(12 / 14))
    assert t_test(np.zeros(3)) == 1.0


@pytest.mark.parametrize(
    "mean, p",
    # The nearer margin lies 0.01 or 0.005 from the mean, at a standard error of 0.001 / sqrt(3): t^2 is 300 or 75.
    [(0.0, (1 - sqrt(300 / 302)) / 2), (0.005, (1 - sqrt(75 / 77)) / 2), (-0.005, (1 - sqrt(75 / 77)) / 2),
     (0.015, (1 + sqrt(75 / 77)) / 2)],
)  # fmt: skip
def test_two_one_sided_tests(mean, p):
    assert tost(mean + np.array([-0.001, 0.0, 0.001]), 0.01) == pytest.approx(p)


def test_equal_differences_are_certain():
    assert tost(np.full(4, 0.002), 0.01) == 0.0
    assert tost(np.full(4, 0.02), 0.01) == 1.0
    assert bootstrap(np.full(4, 0.002)) == (0.002, 0.002)


def test_the_bootstrap_covers_the_mean_as_often_as_it_says():
    draws = np.random.default_rng(1).normal(0.3, 1.0, (100, 20))
    intervals = [bootstrap(draw) for draw in draws]
    assert 85 <= sum(low <= 0.3 <= high for low, high in intervals) <= 99
    assert bootstrap(draws[0]) == intervals[0]
    width = np.mean([high - low for low, high in intervals])
    assert width == pytest.approx(2 * 1.96 / sqrt(20), rel=0.1)


@pytest.mark.slow
def test_the_bootstrap_of_seeds_and_scenes_covers_what_varies_over_both():
    rng, covered = np.random.default_rng(2), 0
    for _ in range(60):
        of_seeds, of_scenes = rng.normal(0, 0.2, (12, 1)), rng.normal(0, 1.0, (1, 80))
        low, high = bootstrap_of_both(0.3 + of_seeds + of_scenes + rng.normal(0, 0.5, (12, 80)))
        covered += low <= 0.3 <= high
    assert 49 <= covered <= 60
    same_scenes = np.repeat([[0.1], [0.3]], 5, axis=1)  # only seeds differ: the mean is 0.1, 0.2 or 0.3
    assert bootstrap_of_both(same_scenes) == pytest.approx((0.1, 0.3))


def test_the_runs_that_show_a_difference():
    # (1.95996 + 0.84162)^2 = 7.8489.
    assert runs_needed(0.03, 0.02) == 18 + 2
    assert runs_needed(0.02, 0.02) == 8 + 2
    assert runs_needed(0.0, 0.02) == 2


@pytest.mark.parametrize("values", [[1.0, 2.0], [1.0, 2.0, 4.0]])
def test_a_difference_of_few_seeds(values):
    figures = difference(values)
    low, high = figures.interval
    assert min(values) <= low < figures.mean < high <= max(values)
    assert figures.count == len(values) and figures.error > 0
    assert difference(values[:1]) is None
