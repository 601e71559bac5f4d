"""Whether a plan had a run, and planned a contrast, before the run: by git, at the run's revision."""

import subprocess
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from ds_cmli.common.errors import UserError
from profiling.learning.plan import Contrast, Plan, load

YES, UNKNOWN = "yes", "unknown"  # unknown: git has no such revision, or the plan is none of today's
NO_PLAN, OTHER_SETTINGS, OTHER_SEED = "no, no plan", "no, other settings", "no, other seeds"
COLUMNS = ["in_plan", "planned"]  # of a run's line


@dataclass(frozen=True)
class Registered:
    """What a plan had at a revision."""

    # Seed and settings, as an arm may have had another name: of the plan's runs, and of its tuning.
    runs: frozenset[tuple[int, str]]
    tuning: frozenset[tuple[int, str]]
    planned: str  # the planned contrasts, as `decision` names them

    def verdict(self, seed: int, settings: str) -> str:
        if (seed, settings) in self.runs | self.tuning:
            return YES
        return OTHER_SEED if settings in {own for _, own in self.runs} else OTHER_SETTINGS


def decision(contrast: Contrast, endpoint: str) -> str:
    """How a planned contrast at an endpoint is named in a run's line."""
    margin = "" if contrast.equivalence is None else f" ±{contrast.equivalence:g}"
    return f"{contrast}{margin} in {endpoint}"


def fill(plan: Plan, line: dict[str, str]) -> dict[str, str]:
    """A run's line with the columns of this module, where they are not known yet."""
    if plan.file is None or line.get(COLUMNS[0], UNKNOWN) not in ("", UNKNOWN):
        return line
    had = at(plan.file.resolve(), line.get("revision", "").removesuffix("+"))
    if isinstance(had, str):
        return {**line, "in_plan": had, "planned": ""}
    verdict = had.verdict(int(line["seed"]), line["settings"])
    return {**line, "in_plan": verdict, "planned": had.planned}


@cache
def at(file: Path, revision: str) -> Registered | str:
    """What a plan's file had at a revision; `NO_PLAN` or `UNKNOWN` where that is not known."""
    if not revision or _git(file, "cat-file", "-e", f"{revision}^{{commit}}") is None:
        return UNKNOWN
    text = _git(file, "show", f"{revision}:./{file.name}")
    if text is None:
        return NO_PLAN
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # The JSONs that arms name lie in the plan's folder.
        listed = _git(file, "ls-tree", "--name-only", revision, "./") or b""
        for config in listed.decode().split("\n"):
            if config.endswith(".json"):
                (folder / config).write_bytes(_git(file, "show", f"{revision}:./{config}") or b"")
        (folder / file.name).write_bytes(text)
        try:
            plan = load(folder / file.name)
        except UserError:
            return UNKNOWN
        runs, tuning = _known(plan), frozenset[tuple[int, str]]()
        with suppress(UserError):  # it has no tuning seeds
            tuning = _known(load(folder / file.name, tuning=True))
    decisions = []
    for contrast in plan.contrasts:
        if contrast.planned:
            decisions += [decision(contrast, endpoint) for endpoint in plan.endpoints]
    return Registered(runs, tuning, "; ".join(decisions))


def _known(plan: Plan) -> frozenset[tuple[int, str]]:
    return frozenset((run.seed, run.described()) for run in plan.runs())


def _git(file: Path, *command: str) -> bytes | None:
    """What git prints in the plan's folder; None where it fails."""
    try:
        done = subprocess.run(["git", "-C", str(file.parent), *command], capture_output=True)
    except OSError:
        return None
    return done.stdout if done.returncode == 0 else None
