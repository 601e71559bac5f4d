"""Reads the files of runs, and groups runs that differ only in their seed."""

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from typing_extensions import TypedDict

from ds_cmli.common import checksums, json_text
from ds_cmli.common.errors import UserError, printable
from ds_cmli.config.schema import load_config
from ds_cmli.config.settings import flatten
from ds_cmli.config.validation import MOST, check_kind, shown

# Former endings of column names, which runs of earlier versions have written, and the present ones.
FORMER = {"/pointing": "/pointing_game"}
# Settings that may differ between the runs of a group.
NOT_A_SETTING = ("run.seed", "run.output_dir")
# Settings of the data that change nothing about which pairs are held out.
SAME_PAIRS = (
    "image_size",
    "aspect_patch",
    "context_length",
    "tokenizer",
    "workers",
    "prefetch",
    "augmentation",
    "max_bad_share",
)
LARGEST = 1e39  # above every number of fp32


class Figures(TypedDict, total=False):
    categories: dict[str, int]
    totals: dict[str, int]


class MeasuredMemory(TypedDict, total=False):
    """What the report takes of memory.json, in bytes."""

    prediction: Figures | None
    measurement: Figures | None


@dataclass
class RunContent:
    """The content of a run's files."""

    folder: Path
    name: str  # on the page, where no other run has it
    settings: dict[str, Any]  # by "section.name"; "deepspeed" is the section of the DeepSpeed JSON
    metrics: list[dict[str, Any]]  # the objects of metrics.jsonl
    memory: dict[str, Any] | None  # the content of memory.json, if the run has measured its memory

    def curve(self, column: str) -> tuple[list[int], list[float]]:
        """The steps and values of one column, without values that are not finite."""
        steps, values = [], []
        for line in self.metrics:
            value = line.get(column)
            if isinstance(value, int | float) and math.isfinite(value):
                steps.append(line["step"])
                values.append(value)
        return steps, values

    def last(self, prefix: str) -> dict[str, object]:
        """The last value of every column whose name begins with `prefix`."""
        out: dict[str, object] = {}
        for line in self.metrics:
            out |= {name: value for name, value in line.items() if name.startswith(prefix)}
        return out


def read_all(folders: Sequence[str]) -> list[RunContent]:
    """Read runs, each named by its folder, or by the path as given if several have that name.

    Raises:
        UserError: one is no run, or is given twice.
    """
    paths: dict[Path, str] = {}
    for folder in folders:
        path = Path(folder).resolve()
        if path in paths:
            raise UserError(f"RUN has {paths[path]!r} twice: give each run once")
        paths[path] = folder
    unique = len({path.name for path in paths}) == len(paths)
    return [read(folder, path.name if unique else folder) for path, folder in paths.items()]


def read(folder: str | Path, name: str = "") -> RunContent:
    """Read a run's folder, by default by its own name; raises `UserError` if it is not one."""
    folder = Path(folder)
    run = f"RUN is {str(folder)!r}"
    config = load_config(folder / "config.json", "RUN").to_dict()
    content = json_text.read(folder / "config.json", dict)
    settings = flatten({**config, "deepspeed": content.get("deepspeed", {})})
    metrics = []
    path = folder / "metrics.jsonl"
    try:
        # After the last line break there is nothing, or a line that is being written.
        lines = path.read_bytes().split(b"\n")[:-1]
        for number, line in enumerate(lines, 1):
            values = json_text.parse(line, dict)
            _check(values, number)
            metrics.append({_column(name): value for name, value in values.items()})
    except FileNotFoundError:
        raise UserError(
            f"{run}: it has no metrics.jsonl; give a run that has taken a step"
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"{run}: its metrics.jsonl cannot be read: {error}") from None
    if changed := checksums.changed(lines, path):
        raise UserError(
            f"{run}: line {', '.join(map(str, changed))} of its metrics.jsonl does not agree with "
            f"its checksum in metrics.jsonl{checksums.LINES}: remove the line"
        )
    name = printable(name or folder.resolve().name)
    return RunContent(folder, name, settings, metrics, _memory(folder))


def _check(values: dict[str, object], line: int) -> None:
    """Raise `ValueError` for a line without its step, or with a number beyond those of fp32."""
    step = values.get("step")
    if not isinstance(step, int) or not 0 <= step <= MOST:
        raise ValueError(f"line {line} has the step {shown(step)}")
    for name, value in values.items():
        if isinstance(value, int | float) and LARGEST < abs(value) < math.inf:
            raise ValueError(f"line {line} has {shown(name)} = {shown(value)}")


def _memory(folder: Path) -> dict[str, Any] | None:
    try:
        content = checksums.read(folder / "memory.json")
        check_kind("it", content, MeasuredMemory)
        return content
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(
            f"RUN is {str(folder)!r}: its memory.json cannot be read: {error}; remove the file"
        ) from None


def _column(name: str) -> str:
    """The present name of a column."""
    for former, present in FORMER.items():
        if name.startswith("eval/") and name.endswith(former):
            name = name.removesuffix(former) + present
    return printable(name)


def columns_of(runs: Sequence[RunContent]) -> dict[str, None]:
    """The columns of all runs, in the order in which they first stand in a file."""
    out: dict[str, None] = {}
    for run in runs:
        for line in run.metrics:
            out |= dict.fromkeys(line)
    return out


def groups(runs: Sequence[RunContent]) -> list[list[RunContent]]:
    """Groups of runs that differ only in their seed, in the order of their first run."""
    out: dict[str, list[RunContent]] = {}
    for run in runs:
        settings = dict(run.settings)
        for name in NOT_A_SETTING:
            settings.pop(name, None)
        out.setdefault(json.dumps(settings, sort_keys=True, default=str), []).append(run)
    return list(out.values())


def measured_on(run: RunContent) -> str:
    """What says, next to their number, which pairs a run is measured on."""
    data = {key: run.settings[key] for key in run.settings if key.startswith("data.")}
    for name in SAME_PAIRS:
        data.pop(f"data.{name}", None)
    return json.dumps(data, sort_keys=True, default=str)


def group_name(group: Sequence[RunContent]) -> str:
    return ", ".join(run.name for run in group)


def differing(runs: Sequence[RunContent]) -> dict[str, list[object]]:
    """The settings that differ, with the value of each run, or None if it has none."""
    names: dict[str, None] = {}
    for run in runs:
        names |= dict.fromkeys(run.settings)
    out = {}
    for name in names:
        values = [run.settings.get(name) for run in runs]
        if name != "run.output_dir" and values.count(values[0]) < len(values):
            out[name] = values
    return out


@dataclass(frozen=True)
class Mean:
    """The mean over the runs of a group."""

    value: float
    error: float | None  # standard error of the mean; None for a single run
    count: int

    def __str__(self) -> str:
        return self._as(".3f")

    def shown(self, share: bool = False) -> str:
        """The mean as percent, or with three significant digits."""
        if share:
            return self._as(".1%")
        return self._as(",.3g" if abs(self.value) < 1000 else ",.0f")

    def _as(self, form: str) -> str:
        value = format(self.value, form)
        if self.error is None:
            return value
        return f"{value} ± {format(self.error, form)}"


def mean(values: Sequence[float]) -> Mean:
    error = None
    if len(values) > 1:
        error = statistics.stdev(values) / math.sqrt(len(values))
    return Mean(statistics.fmean(values), error, len(values))
