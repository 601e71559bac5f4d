"""Models side by side on a suite, with 95% intervals by the paired bootstrap over samples.

Shapes: n samples, R resamples.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ds_cmli.common.cli import say
from ds_cmli.common.documents import write_page
from ds_cmli.common.errors import UserError
from ds_cmli.evaluate.model import EvaluatedModel
from ds_cmli.evaluate.suites.task import Measured, Task

RESAMPLES = 2000
AT_A_TIME = 200  # resamples in memory
QUANTILES = (0.025, 0.975)
Interval = tuple[float, float]


@dataclass
class Metric:
    """A metric as the JSON has it; null for a model that lacks its kind of score."""

    values: list[float | None]  # of each model
    intervals: list[Interval | None]
    differences: list[float | None]  # of each model after the first, to the first
    difference_intervals: list[Interval | None]


@dataclass
class TaskResult:
    kind: str
    samples: int
    metrics: dict[str, Metric] = field(default_factory=dict)
    figures: dict[str, list[float | None]] = field(default_factory=dict)  # of each model
    notes: dict[str, list[str]] = field(default_factory=dict)  # by model


def run_suite(
    tasks: Mapping[str, Task], names: Sequence[str], load: Callable[[str], EvaluatedModel]
) -> tuple[dict[str, TaskResult], list[str]]:
    """Measure each model on each task; one model is in memory at a time.

    Returns the results, and a line for each task that a model cannot be measured on, as a picture
    cannot be read: the others are measured nevertheless.

    Raises:
        UserError: a model cannot be loaded.
    """
    measured: dict[str, list[Measured]] = {name: [] for name in tasks}
    problems: dict[str, str] = {}
    for name in names:
        model = load(name)
        for task in [task for task in tasks if task not in problems]:
            try:
                measured[task].append(tasks[task].run(model))
                say(f"{name}: {task} is measured")
            except UserError as error:
                problems[task] = f"--suite: {task}: {error}"
        del model
    results: dict[str, TaskResult] = {}
    for task in tasks:
        if task in problems:
            continue
        try:
            results[task] = _result(tasks[task], names, measured[task])
        except UserError as error:
            problems[task] = f"--suite: {task}: {error}"
    return results, [*problems.values()]


def _result(task: Task, names: Sequence[str], of_models: Sequence[Measured]) -> TaskResult:
    result = TaskResult(type(task).__name__, of_models[0].samples)
    counts = {measured.samples for measured in of_models}
    if len(counts) > 1:
        raise UserError(f"the models have {counts} samples: give data that all can read")
    drawn: dict[str, list[Tensor]] = {}
    figures: dict[str, None] = {}
    for measured in of_models:
        drawn |= {metric: [] for metric in measured.measures}
        figures |= dict.fromkeys(measured.figures)
    for times in _resamples(result.samples):
        for metric, parts in drawn.items():
            parts.append(_values(of_models, metric, times))
    once = torch.ones(result.samples, 1, dtype=torch.float64)
    for metric, parts in drawn.items():
        values, whole = _values(of_models, metric, once)[:, 0], torch.cat(parts, 1)
        result.metrics[metric] = Metric(
            _numbers(values),
            _intervals(whole),
            _numbers(values[1:] - values[0]),
            _intervals(whole[1:] - whole[0]),
        )
    for figure in figures:
        result.figures[figure] = [measured.figures.get(figure) for measured in of_models]
    for name, measured in zip(names, of_models, strict=True):
        if measured.notes:
            result.notes[name] = measured.notes
    return result


def _values(of_models: Sequence[Measured], metric: str, times: Tensor) -> Tensor:
    """A metric of each model on resamples, fp64 [models, R]; NaN of one that lacks it."""
    out = torch.full((len(of_models), times.shape[1]), torch.nan, dtype=torch.float64)
    for row, measured in zip(out, of_models, strict=True):
        if metric in measured.measures:
            row[:] = measured.measures[metric].resampled(times)
    return out


def _numbers(values: Tensor) -> list[float | None]:
    return [None if math.isnan(value) else value for value in values.tolist()]


def _intervals(drawn: Tensor) -> list[Interval | None]:
    """The interval of each row of [rows, R]; None of one with NaN."""
    out: list[Interval | None] = []
    for row in drawn.numpy():
        low, high = np.quantile(row, QUANTILES).tolist()
        out.append(None if math.isnan(low) else (low, high))
    return out


def _resamples(samples: int) -> Iterator[Tensor]:
    """How often each sample is drawn: fp64 [n, some of R], the same each time."""
    rng = np.random.default_rng(0)
    for _ in range(0, RESAMPLES, AT_A_TIME):
        drawn = rng.integers(0, samples, (AT_A_TIME, samples))
        drawn += samples * np.arange(AT_A_TIME)[:, None]
        times = np.bincount(drawn.ravel(), minlength=AT_A_TIME * samples)
        yield torch.from_numpy(times).double().view(AT_A_TIME, samples).t()


def table(result: TaskResult) -> tuple[list[str], dict[str, list[str]]]:
    """The heads of a task's columns, and the cells of each metric.

    Of one model its value and interval; of several each value, then the differences to the first.
    """
    rows, models = {}, 0
    for name, metric in result.metrics.items():
        models = len(metric.values)
        intervals = metric.intervals if models == 1 else [None] * models
        cells = list(map(_cell, metric.values, intervals))
        cells += map(_cell, metric.differences, metric.difference_intervals, "+" * models)
        rows[name] = cells
    for name, values in result.figures.items():
        if name.startswith("chance/"):
            rows[name] = [*map(_cell, values), *[""] * (len(values) - 1)]
    heads = list(map(str, range(1, models + 1)))
    return heads + [f"{number} - 1" for number in heads[1:]], rows


def _cell(value: float | None, interval: Interval | None = None, sign: str = "") -> str:
    if value is None:
        return "-"
    text = f"{value:{sign}.3f}"
    if interval is not None:
        low, high = interval
        text += f" [{low:{sign}.3f}, {high:{sign}.3f}]"
    return text


def print_results(results: Mapping[str, TaskResult], names: Sequence[str]) -> None:
    for number, name in enumerate(names, 1):
        say(f"  {number}: {name}")
    for task, result in results.items():
        heads, rows = table(result)
        say(f"  {task}: {result.kind}, {result.samples} samples")
        lines = [["", *heads], *([name, *cells] for name, cells in rows.items())]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        for name, *cells in lines:
            line = "  ".join(map(str.rjust, cells, widths[1:]))
            say(f"    {name:{widths[0]}}  {line}")
        for name, notes in result.notes.items():
            for note in notes:
                say(f"    {name}: {note}")


def write(
    results: Mapping[str, TaskResult], names: Sequence[str], json_file: str | None, page: str | None
) -> None:
    """Write the results as JSON and as a page, where their files are given."""
    if json_file:
        content = {"models": names, "tasks": {name: asdict(of) for name, of in results.items()}}
        Path(json_file).write_text(json.dumps(content, indent=2) + "\n")
    if page:
        title = "Suite of " + (names[0] if len(names) == 1 else f"{len(names)} models")
        values = {"title": title, "names": names, "results": results, "rows": table}
        write_page(page, "--page", "ds_cmli.evaluate.suites", "suite.html.jinja", **values)
