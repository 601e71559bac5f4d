"""The report of an ablation: its table, and what its planned contrasts carry, in sentences."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ds_cmli.report.runs import mean
from profiling.ablation.plan import Contrast, Plan
from profiling.ablation.records import HITS, Records, hits, values
from profiling.ablation.statistics import (
    RESAMPLES,
    Difference,
    difference,
    holm,
    runs_needed,
)
from profiling.tables import Table

ALPHA = 0.05
NOTES = [
    "mean ± standard error over seeds; differences are paired by seed, over the seeds both have",
    f"95% interval: bootstrap over seeds and scenes ({RESAMPLES:,} resamples) where each scene's "
    "hits are known, or over seeds alone (BCa)",
    "p: paired t-test, two-sided; with a margin (TOST) two one-sided tests that the difference "
    "lies within it. Holm: over the planned contrasts of an endpoint",
]


@dataclass(frozen=True)
class Compared:
    """A contrast at one endpoint."""

    contrast: Contrast
    endpoint: str
    by_seed: dict[int, float]  # the paired difference of each seed that both arms have
    found: Difference | None  # None with fewer than two seeds
    adjusted: float | None  # by Holm; None where it was not planned

    def finding(self) -> str:
        """What the numbers carry, as a sentence."""
        if self.found is None or self.adjusted is None:
            return f"{self.contrast}, {self.endpoint}: not enough runs"
        shown = self.adjusted < ALPHA
        if self.contrast.equivalence is not None:
            verdict = "equivalent" if shown else "not shown to be equivalent"
            verdict += f" within {self.contrast.equivalence:g}"
        else:
            verdict = "different" if shown else "not shown to differ"
        return (
            f"{self.contrast.arm} and {self.contrast.against} are {verdict} in {self.endpoint}: "
            f"{self.found}, n = {self.found.count}, p = {self.adjusted:.2g} (Holm)"
        )


def compare(plan: Plan, found: Records) -> list[Compared]:
    """Every contrast at every endpoint."""
    out = []
    for endpoint in plan.endpoints:
        pairs = [paired(plan, found, contrast, endpoint) for contrast in plan.contrasts]
        tests = []
        for contrast, by_seed in zip(plan.contrasts, pairs, strict=True):
            scenes = by_scene(found, contrast, endpoint, list(by_seed))
            tests.append(difference(list(by_seed.values()), contrast.equivalence, scenes))
        planned = [i for i, c in enumerate(plan.contrasts) if c.planned]
        # One that cannot be tested yet counts too, so that no p-value grows as runs come in.
        p_values = [1.0 if (test := tests[i]) is None else test.p for i in planned]
        adjusted = dict(zip(planned, holm(p_values), strict=True))
        for i, contrast in enumerate(plan.contrasts):
            out.append(Compared(contrast, endpoint, pairs[i], tests[i], adjusted.get(i)))
    return out


def paired(plan: Plan, found: Records, contrast: Contrast, endpoint: str) -> dict[int, float]:
    """The difference of an endpoint by seed, for the seeds of both arms."""
    one, other = (
        values(found, name, plan.seeds(name), endpoint) for name in (contrast.arm, contrast.against)
    )
    return {seed: one[seed] - other[seed] for seed in one if seed in other}


def by_scene(
    found: Records, contrast: Contrast, endpoint: str, seeds: Sequence[int]
) -> np.ndarray | None:
    """The paired difference of each seed and scene, as recalls; None where hits are not known."""
    arms = []
    for arm in (contrast.arm, contrast.against):
        arms.append([hits(found, arm, seed, endpoint) for seed in seeds])
    one, other = arms
    of_recall = endpoint.endswith("mean_recall") and bool(seeds)
    # Those of a run from before the number of scenes was changed cannot be paired.
    if not of_recall or len({len(hits) for hits in (*one, *other)}) != 1 or not one[0]:
        return None
    return (np.asarray(one, dtype=np.float64) - np.asarray(other, dtype=np.float64)) / HITS


def power_table(compared: Sequence[Compared], wanted: float) -> Table:
    """The runs that each contrast needs, by the spread of those that are there."""
    rows = []
    for one in compared:
        if one.found is not None:
            needed = runs_needed(one.found.deviation, wanted)
            deviation = f"{one.found.deviation:.4f}"
            rows.append(
                [str(one.contrast), one.endpoint, str(one.found.count), deviation, str(needed)]
            )
    columns = ["contrast", "endpoint", "seeds", "deviation", f"seeds for {wanted:g}"]
    note = "standard deviation of the paired differences, and the seeds that show such a difference"
    return Table("Power", columns, rows, [f"{note} by a two-sided t-test at 5% with power 80%"])


def secondary_table(plan: Plan, found: Records) -> Table:
    """The contrasts at the secondary endpoints: differences and their errors, without a test."""
    rows = []
    for contrast in plan.contrasts:
        row = [str(contrast)]
        for endpoint in plan.secondary:
            row.append(mean_cell(paired(plan, found, contrast, endpoint), "+"))
        rows.append(row)
    return Table("Differences, not decided on", ["contrast", *plan.secondary], rows)


def arms_table(plan: Plan, found: Records, endpoints: Sequence[str]) -> Table:
    rows = []
    for arm in plan.arms:
        cells = [values(found, arm, plan.seeds(arm), endpoint) for endpoint in endpoints]
        of = len(plan.seeds(arm))
        rows.append([arm, f"{min(map(len, cells))} of {of}", *map(mean_cell, cells)])
    return Table("Arms", ["arm", "runs", *endpoints], rows)


def mean_cell(by_seed: dict[int, float], sign: str = "") -> str:
    if not by_seed:
        return "-"
    found = mean([*by_seed.values()])
    error = "" if found.error is None else f" ± {found.error:.4f}"
    return f"{found.value:{sign}.4f}{error}"


def contrasts_table(compared: Sequence[Compared]) -> Table:
    columns = ["contrast", "endpoint", "seeds", "difference", "95% interval", "test", "p", "Holm"]
    rows = []
    for one in compared:
        margin, test = one.contrast.equivalence, one.found
        name = "paired t" if margin is None else f"TOST ±{margin:g}"
        row = [str(one.contrast), one.endpoint, str(len(one.by_seed))]
        if test is None:
            rows.append([*row, "-", "-", name, "-", "-"])
            continue
        low, high = test.interval
        adjusted = "not planned" if one.adjusted is None else f"{one.adjusted:.2g}"
        interval = f"{low:+.4f} to {high:+.4f}"
        rows.append([*row, str(test), interval, name, f"{test.p:.2g}", adjusted])
    findings = [one.finding() for one in compared if one.contrast.planned]
    return Table("Contrasts", columns, rows, NOTES + findings)
