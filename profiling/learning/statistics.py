"""Statistics of paired differences, one for each seed, or for each seed and scene.

Shapes: S seeds, n scenes.
"""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

RESAMPLES = 9_999  # of the bootstrap


@dataclass(frozen=True)
class Difference:
    """The mean of paired differences."""

    count: int
    mean: float
    error: float  # standard error of the mean
    deviation: float  # standard deviation over seeds
    interval: tuple[float, float]  # 95%, by the bootstrap over seeds, or over seeds and scenes
    p: float  # that of the paired t-test for no difference, or of the TOST

    def __str__(self) -> str:
        return f"{self.mean:+.4f} ± {self.error:.4f}"


def difference(
    values: Sequence[float], margin: float | None = None, scenes: np.ndarray | None = None
) -> Difference | None:
    """Describe and test paired differences; None for fewer than two.

    Args:
        margin: the margin of equivalence for a TOST; None: a paired t-test, two-sided.
        scenes: [S, n], the difference of each scene, whose mean over scenes is in `values`; None:
            scenes are not resampled.
    """
    if len(values) < 2:
        return None
    x = np.asarray(values, dtype=np.float64)
    deviation = float(x.std(ddof=1))
    p = t_test(x) if margin is None else tost(x, margin)
    interval = bootstrap(x) if scenes is None else bootstrap_of_both(scenes)
    return Difference(
        len(x), float(x.mean()), deviation / math.sqrt(len(x)), deviation, interval, p
    )


def runs_needed(deviation: float, wanted: float) -> int:
    """The pairs of runs that show a difference: a two-sided t-test at 5% with a power of 80%.

    The normal approximation, (1.96 + 0.84)^2 (deviation / wanted)^2, and two more pairs for the
    deviation's being estimated (Guenther, 1981).

    Args:
        deviation: of the paired differences over seeds.
        wanted: the difference to be shown.
    """
    z = stats.norm.ppf(0.975) + stats.norm.ppf(0.8)
    return math.ceil((z * deviation / wanted) ** 2) + 2


def t_test(x: np.ndarray) -> float:
    """The two-sided p-value of a mean of 0; 1 where all values are 0."""
    return _p(x, 0.0, "two-sided")


def tost(x: np.ndarray, margin: float) -> float:
    """The p-value of two one-sided t-tests that the mean lies within plus or minus `margin`.

    The larger of both p-values (Schuirmann, 1987). Below 0.05 the 90% t-interval lies within.
    """
    return max(_p(x, -margin, "greater"), _p(x, margin, "less"))


def _p(x: np.ndarray, mean: float, alternative: str) -> float:
    with warnings.catch_warnings():  # values that are all equal have no deviation: p is 0 or 1
        warnings.simplefilter("ignore", RuntimeWarning)
        p = float(stats.ttest_1samp(x, mean, alternative=alternative).pvalue)
    return 1.0 if math.isnan(p) else p


def bootstrap(x: np.ndarray) -> tuple[float, float]:
    """The 95% interval of the mean by the bootstrap, bias-corrected and accelerated (BCa).

    The resamples are the same each time. With few seeds it is narrower than it should be.
    """
    if np.ptp(x) == 0:
        return float(x[0]), float(x[0])
    interval = stats.bootstrap(
        (x,), np.mean, n_resamples=RESAMPLES, method="BCa", rng=np.random.default_rng(0)
    ).confidence_interval
    return float(interval.low), float(interval.high)


def bootstrap_of_both(scenes: np.ndarray) -> tuple[float, float]:
    """The 95% percentile interval of the mean, seeds and scenes drawn anew, each with replacement.

    All seeds of a resample have the same scenes, as the runs have.

    Args:
        scenes: [S, n].
    """
    rng = np.random.default_rng(0)
    seeds, count = scenes.shape
    of_seeds = rng.multinomial(seeds, [1 / seeds] * seeds, RESAMPLES) / seeds
    means = np.empty(RESAMPLES)
    for number, weights in enumerate(of_seeds):
        of_scenes = rng.multinomial(count, [1 / count] * count) / count
        means[number] = weights @ scenes @ of_scenes
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust p-values for their number, in their order (Holm, 1979)."""
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    out, most = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        most = max(most, min(1.0, (len(p_values) - rank) * p_values[i]))
        out[i] = most
    return out
