"""The records of runs: one line of a CSV file each.

Each run's line is first a file of its own in the run's folder, so that tasks of an array need no
lock: the plan's CSV file is what it held before together with the lines of all folders, and is
replaced as a whole. A line in it counts as a run that is done, wherever it was made.
"""

import csv
import io
import json
import uuid
from collections.abc import Sequence
from pathlib import Path

from ds_cmli.common.errors import UserError, nearest
from ds_cmli.report.runs import read
from profiling.learning import registered
from profiling.learning.plan import Plan, Run
from profiling.learning.runs import seconds_of
from profiling.scripts import processor

FILE = "ablation.csv"  # in a run's folder
MEASURED = "endpoints.json"  # there too: what profiling/learning/endpoints.py has measured
PEAK = "memory/peak_memory_bytes"  # in a run's TensorBoard
HITS = 6  # recalls, at 1, 5 and 10 both ways, that a scene's digit counts
BESIDE = ["revision", "seconds", "peak_memory_bytes", "cpu", "settings", *registered.COLUMNS]

Record = dict[str, str]  # a cell by column
Records = dict[tuple[str, int], Record]  # by arm and seed


def record(plan: Plan, run: Run, folder: Path) -> None:
    """Write the line of a run that has ended. Raises `UserError` if it lacks an endpoint."""
    figures = read(folder).last("eval/") | _afterwards(folder)
    line = {"arm": run.arm, "seed": str(run.seed)}
    for endpoint in plan.measured:
        if endpoint not in figures:
            raise UserError(f"endpoints has {endpoint!r}, which run {folder} has not measured: "
                            f"{nearest(endpoint, figures)}")  # fmt: skip
        line[endpoint] = repr(figures[endpoint])
        if hits_of(endpoint) in figures:
            line[hits_of(endpoint)] = str(figures[hits_of(endpoint)])
    config = json.loads((folder / "config.json").read_text())
    line |= {
        "revision": str(config["revision"]),
        "seconds": f"{seconds_of(folder):.0f}",
        "peak_memory_bytes": peak_memory(folder),
        "cpu": processor(),
        "settings": run.described(),
    }
    write(folder / FILE, [registered.fill(plan, line)])


def _afterwards(folder: Path) -> dict[str, float | str]:
    """What was measured when the run had ended."""
    file = folder / MEASURED
    return json.loads(file.read_text()) if file.is_file() else {}


def hits_of(endpoint: str) -> str:
    """The column that says how many of six recalls each scene hits, a digit a scene."""
    return f"{endpoint.rpartition('/')[0]}/hits"


def peak_memory(folder: Path) -> str:
    """The most memory that a run has held, of a GPU or else of the process; "" if not known."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    if PEAK not in events.Tags()["scalars"]:
        return ""
    return f"{max(event.value for event in events.Scalars(PEAK)):.0f}"


def merge(plan: Plan, file: Path, out: Path) -> Records:
    """Add the lines of all runs' folders in `out` to the CSV file, and return all of them.

    Each says whether the plan had the run at its revision.
    """
    before = load(file)
    lines = dict(before)
    for line in sorted(out.glob(f"*/{FILE}")):
        lines |= load(line)
    lines = {key: registered.fill(plan, line) for key, line in lines.items()}
    if lines != before:
        write(file, [lines[key] for key in sorted(lines)])
    return lines


def load(file: Path) -> Records:
    """Read a CSV file; none is one without lines. Raises `UserError` if it cannot be read."""
    if not file.exists():
        return {}
    with file.open(newline="", encoding="utf-8") as stream:
        lines = list(csv.DictReader(stream))
    try:
        return {(line["arm"], int(line["seed"])): line for line in lines}
    except (KeyError, ValueError) as error:
        raise UserError(
            f"{str(file)!r} is no CSV of an ablation's runs (columns arm, seed, ...): {error}"
        ) from None


def write(file: Path, lines: Sequence[Record]) -> None:
    """Write a CSV file in one piece: a reader sees the former content or the new one."""
    columns: dict[str, None] = {}
    for line in lines:
        columns |= dict.fromkeys(line)
    names = [name for name in columns if name not in BESIDE] + BESIDE
    text = io.StringIO()
    writer = csv.DictWriter(text, names, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    new = file.with_name(f"{file.name}.{uuid.uuid4().hex}")
    new.write_text(text.getvalue(), encoding="utf-8")
    new.replace(file)


def missing(plan: Plan, runs: Sequence[Run], records: Records) -> list[Run]:
    """The runs without a complete line. Raises `UserError` for a line of other settings."""
    out = []
    for run in runs:
        line = records.get((run.arm, run.seed))
        if line is not None and line["settings"] != run.described():
            raise UserError(
                f"run {run.name} is there with other settings ({line['settings']}) than the plan "
                f"has ({run.described()}): give the arm another name"
            )
        if line is None or not all(line.get(endpoint) for endpoint in plan.measured):
            out.append(run)
    return out


def hits(records: Records, arm: str, seed: int, endpoint: str) -> list[int]:
    """How many of six recalls each scene of a run hits; [] where the endpoint is not such a one."""
    cell = records.get((arm, seed), {}).get(hits_of(endpoint), "")
    return [int(digit) for digit in cell]


def values(records: Records, arm: str, seeds: Sequence[int], endpoint: str) -> dict[int, float]:
    """An endpoint by seed, of the runs that are there."""
    out = {}
    for seed in seeds:
        cell = records.get((arm, seed), {}).get(endpoint)
        if cell:
            out[seed] = float(cell)
    return out
