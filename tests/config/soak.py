"""The ways in which a case of `pytest -m soak tests/config` may end, and their counts.

- refused: in one line, exit code 2;
- told: a line about it is printed that the unchanged run does not print;
- effective: what happens differs from the unchanged run: losses, weights, results, files, learning rates;
- silent: nothing differs and nothing is said, or the process waits for ranks that cannot come;
- traceback.
"""

from collections import Counter
from dataclasses import dataclass, field

WAYS = ("refused", "told", "effective", "silent", "traceback")


@dataclass
class Counts:
    """How the cases of one kind ended."""

    kind: str
    ended: Counter = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    def add(self, case: str, way: str) -> None:
        self.ended[way] += 1
        if way in ("silent", "traceback"):
            self.wrong.append(f"{way}: {case}")

    def line(self) -> str:
        item = ", ".join(f"{self.ended[way]} {way}" for way in WAYS)
        return f"{self.kind}: {sum(self.ended.values())} cases: {item}"
