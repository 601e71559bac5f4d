"""Models side by side on a suite, with 95% intervals by the paired bootstrap over samples.

Shapes: n samples, R resamples.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TypedDict

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


class Metric(TypedDict):
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
) -> dict[str, TaskResult]:
    """Measure each model on each task; one model is in memory at a time.

    Raises:
        UserError: a model cannot be loaded, or a picture cannot be read.
    """
    measured: dict[str, list[Measured]] = {name: [] for name in tasks}
    for name in names:
        model = load(name)
        say(f"model: {name}")
        for task, settings in tasks.items():
            try:
                measured[task].append(settings.run(model))
            except UserError as error:
                raise UserError(f"--suite: {task}: {error}") from None
        del model
    return {task: _result(tasks[task], names, of_task) for task, of_task in measured.items()}


def _result(task: Task, names: Sequence[str], of_models: Sequence[Measured]) -> TaskResult:
    result = TaskResult(type(task).__name__, of_models[0].samples)
    columns = dict.fromkeys(metric for measured in of_models for metric in measured.measures)
    drawn: dict[str, list[list[Tensor] | None]] = {}
    for metric in columns:
        drawn[metric] = [[] if metric in measured.measures else None for measured in of_models]
    for times in _resamples(result.samples):
        for metric, of_metric in drawn.items():
            for measured, values in zip(of_models, of_metric, strict=True):
                if values is not None:
                    values.append(measured.measures[metric].resampled(times))
    for metric, of_metric in drawn.items():
        whole = [None if values is None else torch.cat(values) for values in of_metric]
        result.metrics[metric] = _metric(metric, whole, of_models)
    for figure in dict.fromkeys(name for measured in of_models for name in measured.figures):
        result.figures[figure] = [measured.figures.get(figure) for measured in of_models]
    for name, measured in zip(names, of_models, strict=True):
        if measured.notes:
            result.notes[name] = measured.notes
    return result


def _metric(name: str, drawn: Sequence[Tensor | None], of_models: Sequence[Measured]) -> Metric:
    """One metric of all models, from its resampled values, [R] of each."""
    out: Metric = {"values": [], "intervals": [], "differences": [], "difference_intervals": []}
    for measured, values in zip(of_models, drawn, strict=True):
        value = measured.measures[name].value if values is not None else None
        out["values"].append(value)
        out["intervals"].append(_interval(values))
    first, drawn_first = out["values"][0], drawn[0]
    for value, values in zip(out["values"][1:], drawn[1:], strict=True):
        difference, interval = None, None
        if first is not None and drawn_first is not None and value is not None:
            assert values is not None
            difference, interval = value - first, _interval(values - drawn_first)
        out["differences"].append(difference)
        out["difference_intervals"].append(interval)
    return out


def _interval(values: Tensor | None) -> Interval | None:
    if values is None:
        return None
    low, high = np.quantile(values.numpy(), QUANTILES)
    return float(low), float(high)


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
    models = len(next(iter(result.metrics.values()))["values"]) if result.metrics else 0
    heads = [str(number) for number in range(1, models + 1)]
    heads += [f"{number} - 1" for number in range(2, models + 1)]
    rows = {}
    for name, metric in result.metrics.items():
        intervals: list[Interval | None] = [None] * models
        if models == 1:
            intervals = metric["intervals"]
        cells = [_cell(*pair, "") for pair in zip(metric["values"], intervals, strict=True)]
        pairs = zip(metric["differences"], metric["difference_intervals"], strict=True)
        rows[name] = cells + [_cell(*pair, "+") for pair in pairs]
    for name, values in result.figures.items():
        if name.startswith("chance/"):
            rows[name] = [_cell(value, None, "") for value in values] + [""] * (models - 1)
    return heads, rows


def _cell(value: float | None, interval: Interval | None, sign: str) -> str:
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
        width = max(map(len, [*rows, ""])) + 2
        widths = []
        for column, head in enumerate(heads):
            widths.append(max(len(head), *(len(cells[column]) for cells in rows.values())))
        say(f"  {task}: {result.kind}, {result.samples} samples")
        for name, cells in {"": heads, **rows}.items():
            line = "  ".join(cell.rjust(size) for cell, size in zip(cells, widths, strict=True))
            say(f"    {name:{width}}{line}")
        for name, notes in result.notes.items():
            say(*(f"    {name}: {note}" for note in notes))


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
