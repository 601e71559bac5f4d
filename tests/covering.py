"""Whether a table of runs has any two values of any two axes in one run."""

from collections.abc import Mapping, Sequence
from itertools import combinations, product


def not_met(axes: Mapping[str, Sequence[str]], runs: Sequence[str]) -> list[tuple[str, str]]:
    """The pairs of values that no run has; a run is one value of each axis, with blanks between."""
    met = set()
    for run in runs:
        met |= set(combinations(enumerate(run.split()), 2))
    missing = []
    for (one, values), (other, others) in combinations(enumerate(axes.values()), 2):
        missing += [pair for pair in product(values, others) if ((one, pair[0]), (other, pair[1])) not in met]
    return missing
