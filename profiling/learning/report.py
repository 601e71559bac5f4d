"""The report of an ablation: its table, and what its planned contrasts carry, in sentences."""

import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from ds_cmli.evaluate.metrics import RECALLS
from ds_cmli.report.runs import mean
from profiling.learning import registered
from profiling.learning.plan import Contrast, Plan
from profiling.learning.records import HITS, Records, hits, values
from profiling.learning.statistics import (
    RESAMPLES,
    Difference,
    difference,
    holm,
    runs_needed,
)
from profiling.scripts import Table

ALPHA = 0.05
NOTES = [
    "mean ± standard error over seeds; differences are paired by seed, over the seeds both have",
    f"95% interval: bootstrap over seeds and scenes ({RESAMPLES:,} resamples) where each scene's "
    "hits are known, or over seeds alone (BCa)",
    "p: paired t-test, two-sided; with a margin (TOST) two one-sided tests that the difference "
    "lies within it. Holm: over the planned contrasts of an endpoint; exploratory, over the others",
]
CHANCES = {"one_name": 0.5, "swap": 0.5, "match": 0.25}  # by the part of an endpoint before "/"


@dataclass(frozen=True)
class Compared:
    """A contrast at one endpoint."""

    contrast: Contrast
    endpoint: str
    by_seed: dict[int, float]  # the paired difference of each seed that both arms have
    found: Difference | None  # None with fewer than two seeds
    adjusted: float  # by Holm, over the planned contrasts or over the others
    later: frozenset[int] = frozenset()  # seeds of pairs that the plan did not have when they ran

    @property
    def shown(self) -> bool:
        return self.found is not None and self.adjusted < ALPHA

    def finding(self) -> str:
        """What the numbers carry, as a sentence."""
        if self.found is None:
            return f"{self.contrast}, {self.endpoint}: not enough runs"
        shown = self.shown
        if self.contrast.equivalence is not None:
            verdict = "equivalent" if shown else "not shown to be equivalent"
            verdict += f" within {self.contrast.equivalence:g}"
        else:
            verdict = "different" if shown else "not shown to differ"
        return (
            f"{self.contrast.arm} and {self.contrast.against} are {verdict} in {self.endpoint}: "
            f"{self.found}, n = {self.found.count}, p = {self.adjusted:.2g} (Holm)"
        )


def compare(plan: Plan, records: Records, later: bool | None = None) -> list[Compared]:
    """Every contrast at every endpoint.

    Args:
        later: only over the pairs that the plan did not have when they ran, or (False) only over
            the others.
    """
    out = []
    for endpoint in plan.endpoints:
        pairs, added, tests = [], [], []
        for contrast in plan.contrasts:
            by_seed = paired(plan, records, contrast, endpoint)
            added.append(added_later(records, contrast, endpoint, by_seed))
            if later is not None:
                by_seed = {seed: x for seed, x in by_seed.items() if (seed in added[-1]) == later}
            pairs.append(by_seed)
            scenes = by_scene(records, contrast, endpoint, list(by_seed))
            tests.append(difference(list(by_seed.values()), contrast.equivalence, scenes))
        # One that cannot be tested yet counts too, so that no p-value grows as runs come in.
        p_values = [1.0 if test is None else test.p for test in tests]
        adjusted = dict[int, float]()
        for planned in (True, False):
            family = [i for i, c in enumerate(plan.contrasts) if c.planned == planned]
            adjusted |= zip(family, holm([p_values[i] for i in family]), strict=True)
        for i, contrast in enumerate(plan.contrasts):
            out.append(Compared(contrast, endpoint, pairs[i], tests[i], adjusted[i], added[i]))
    return out


def added_later(
    records: Records, contrast: Contrast, endpoint: str, seeds: Iterable[int]
) -> frozenset[int]:
    """The seeds of pairs that the plan did not have, or not as planned ones, when they ran."""
    named = registered.decision(contrast, endpoint)
    out = set()
    for seed in seeds:
        for arm in (contrast.arm, contrast.against):
            line = records[arm, seed]
            known = line.get("in_plan", "") not in ("", registered.UNKNOWN)
            as_planned = not contrast.planned or named in line.get("planned", "").split("; ")
            if known and not (line["in_plan"] == registered.YES and as_planned):
                out.add(seed)
    return frozenset(out)


def paired(plan: Plan, records: Records, contrast: Contrast, endpoint: str) -> dict[int, float]:
    """The difference of an endpoint by seed, for the seeds of both arms."""
    one, other = (
        values(records, name, plan.seeds(name), endpoint)
        for name in (contrast.arm, contrast.against)
    )
    return {seed: one[seed] - other[seed] for seed in one if seed in other}


def by_scene(
    records: Records, contrast: Contrast, endpoint: str, seeds: Sequence[int]
) -> np.ndarray | None:
    """The paired difference of each seed and scene, as recalls; None where hits are not known."""
    arms = []
    for arm in (contrast.arm, contrast.against):
        arms.append([hits(records, arm, seed, endpoint) for seed in seeds])
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


def secondary_table(plan: Plan, records: Records) -> Table:
    """The contrasts at the secondary endpoints: differences and their errors, without a test."""
    rows = []
    for contrast in plan.contrasts:
        row = [str(contrast)]
        for endpoint in plan.secondary:
            row.append(mean_cell(paired(plan, records, contrast, endpoint), "+"))
        rows.append(row)
    return Table("Differences, not decided on", ["contrast", *plan.secondary], rows)


def runs_table(plan: Plan, records: Records) -> Table:
    """What is known of each arm's runs in addition to their endpoints."""
    rows, not_in_plan = [], dict[str, list[str]]()
    for arm in plan.arms:
        lines = {seed: records[arm, seed] for seed in plan.seeds(arm) if (arm, seed) in records}
        verdicts = {seed: line.get("in_plan") or registered.UNKNOWN for seed, line in lines.items()}
        for seed, verdict in verdicts.items():
            if verdict != registered.YES:
                not_in_plan.setdefault(verdict, []).append(f"{arm}-{seed}")
        count = list(verdicts.values()).count(registered.YES)
        seconds = [float(line["seconds"]) for line in lines.values() if line.get("seconds")]
        cell = "-"
        if seconds:
            cell = f"{statistics.median(seconds):.0f} ({min(seconds):.0f} to {max(seconds):.0f})"
        cpus = Counter(line.get("cpu") or "-" for line in lines.values())
        named = ", ".join(f"{cpu}: {runs}" for cpu, runs in cpus.items())
        rows.append([arm, f"{count} of {len(lines)}", cell, named])
    notes = [
        "in the plan: runs whose settings and seed the plan had at the revision that ran, by git",
        "seconds: wall time, median (least to most), whatever else the machine did",
    ]
    for verdict, runs in not_in_plan.items():
        notes.append(f"in the plan: {verdict}: {', '.join(runs)}")
    return Table("Runs", ["arm", "in the plan", "seconds", "CPU"], rows, notes)


def chance(records: Records, endpoint: str) -> float | None:
    """An endpoint of random scores; None where it is not known."""
    if not endpoint.endswith("mean_recall"):
        return CHANCES.get(endpoint.partition("/")[0])
    for arm, seed in records:
        if scenes := len(hits(records, arm, seed, endpoint)):
            return statistics.fmean(min(1.0, k / scenes) for k in RECALLS)
    return None


def arms_table(plan: Plan, records: Records, endpoints: Sequence[str]) -> Table:
    chances = [chance(records, endpoint) for endpoint in endpoints]
    rows = [["chance", "", *("-" if value is None else f"{value:.4f}" for value in chances)]]
    for arm in plan.arms:
        cells = [values(records, arm, plan.seeds(arm), endpoint) for endpoint in endpoints]
        of = len(plan.seeds(arm))
        rows.append([arm, f"{min(map(len, cells))} of {of}", *map(mean_cell, cells)])
    return Table("Arms", ["arm", "runs", *endpoints], rows)


def mean_cell(by_seed: dict[int, float], sign: str = "") -> str:
    if not by_seed:
        return "-"
    interval = mean([*by_seed.values()])
    error = "" if interval.error is None else f" ± {interval.error:.4f}"
    return f"{interval.value:{sign}.4f}{error}"


def contrasts_table(compared: Sequence[Compared], title: str = "Contrasts") -> Table:
    columns = ["contrast", "endpoint", "seeds", "difference", "95% interval", "test", "p", "Holm"]
    rows = []
    for one in compared:
        margin, test = one.contrast.equivalence, one.found
        name = "paired t" if margin is None else f"TOST ±{margin:g}"
        seeds = str(len(one.by_seed))
        if later := len(one.later & one.by_seed.keys()):
            seeds += f", {later} not in the plan"
        row = [str(one.contrast), one.endpoint, seeds]
        if test is None:
            rows.append([*row, "-", "-", name, "-", "-"])
            continue
        low, high = test.interval
        adjusted = f"{one.adjusted:.2g}{'' if one.contrast.planned else ' (exploratory)'}"
        interval = f"{low:+.4f} to {high:+.4f}"
        rows.append([*row, str(test), interval, name, f"{test.p:.2g}", adjusted])
    findings = [one.finding() for one in compared if one.contrast.planned]
    return Table(title, columns, rows, NOTES + findings + explored(compared))


def explored(compared: Sequence[Compared]) -> list[str]:
    """What the contrasts that were not planned carry, a sentence for each endpoint."""
    out = []
    for endpoint in dict.fromkeys(one.endpoint for one in compared):
        others = [c for c in compared if c.endpoint == endpoint and not c.contrast.planned]
        if others:
            shown = ", ".join(str(one.contrast) for one in others if one.shown) or "none"
            out.append(f"exploratory, of {len(others)} in {endpoint}, shown by Holm: {shown}")
    return out


def split_tables(plan: Plan, records: Records, compared: Sequence[Compared]) -> list[Table]:
    """The planned contrasts that runs were added to later: without these, and over these alone."""
    if not any(one.contrast.planned and one.later for one in compared):
        return []
    out = []
    titles = {False: "Contrasts, over the runs in the plan", True: "Contrasts, over the other runs"}
    for later, title in titles.items():
        parts = [c for c in compare(plan, records, later) if c.contrast.planned and c.later]
        if parts:
            table = contrasts_table(parts, title)
            table.notes = table.notes[len(NOTES) :]
            out.append(table)
    return out
