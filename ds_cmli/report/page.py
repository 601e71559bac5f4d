"""Writes the report's page: results, curves, match maps, memory, and the settings in which the runs differ."""

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ds_cmli.common.pages import write_page
from ds_cmli.common.plots import matplotlib
from ds_cmli.report.maps import match_maps
from ds_cmli.report.runs import RunFiles, differing, groups, mean

CURVES = {  # title -> regular expression of its columns
    "Losses": r"loss(/.*)?",
    "Retrieval, R@1": r"eval/.*_r1",
    "Pointing-game accuracy": r"eval/.*pointing.*",
    "Learning rate": r"lr(/.*)?",
    "Gradient norm": r"grad_norm",
    "Temperatures": r"temperature/.*",
    "Speed": r"pairs_per_s",
}
MOST_LINES = 12  # lines in one chart
RECALL = re.compile(r"(.+)/([^/]+)/((?:i2t|t2i)_r\d+|mean_recall)")  # split, score and metric of a column
WAYS = {"i2t": "image to text", "t2i": "text to image"}


@dataclass(frozen=True)
class Table:
    heads: list[str]
    rows: dict[str, list[str]]


def write(runs: Sequence[RunFiles], path: str | Path) -> None:
    """Write the page; raises `UserError` if matplotlib is missing or the file cannot be written."""
    grouped = groups(runs)
    names = [", ".join(run.name for run in group) for group in grouped]
    results = last_values(grouped)
    values = {
        "title": "Report: " + "; ".join(names),
        "names": names,
        "curves": {title: svg for title, pattern in CURVES.items() if (svg := curves(runs, pattern))},
        "retrieval": retrieval(results, names),
        "results": {name: cells for name, cells in results.items() if not RECALL.fullmatch(name)},
        "maps": {run.name: found for run in runs if (found := match_maps(run.folder))},
        "differing": differing([group[0] for group in grouped]) if len(grouped) > 1 else {},
        "memory": {run.name: memory(run.memory) for run in runs if run.memory},
        "phases": phases(grouped),
        "settings": runs[0].settings,
    }
    write_page(path, "--output", "ds_cmli.report", "report.html.jinja", **values)


def curves(runs: Sequence[RunFiles], pattern: str) -> str:
    """A chart of the columns that match the pattern, as SVG: a colour for each column, a line style for each run."""
    pyplot = matplotlib("the report, for its curves,")
    columns = dict.fromkeys(
        name for run in runs for line in run.metrics for name in line
        if re.fullmatch(pattern, name) and "chance" not in name
    )  # fmt: skip
    figure, axis = pyplot.subplots(figsize=(7, 3.2), constrained_layout=True)
    drawn = 0
    for c, column in enumerate(list(columns)[:MOST_LINES]):
        for r, run in enumerate(runs):
            steps, values = run.curve(column)
            if steps:
                style, marker = ("-", "--", "-.", ":")[r % 4], "o" if len(steps) == 1 else None
                label = column if len(runs) == 1 else f"{column}, {run.name}"
                axis.plot(steps, values, color=f"C{c % 10}", linestyle=style, marker=marker, markersize=3, label=label)
                drawn += 1
    text = ""
    if drawn:
        axis.set_xlabel("optimizer steps")
        axis.grid(alpha=0.3)
        if drawn <= MOST_LINES:
            axis.legend(fontsize=7)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg")
        text = buffer.getvalue()
        text = text[text.index("<svg") :]
    pyplot.close(figure)
    return text


def last_values(grouped: Sequence[Sequence[RunFiles]]) -> dict[str, list[str]]:
    """The last value of each held-out metric, a cell for each group of runs: their mean, with its standard error."""
    last = [[run.last("eval/") for run in group] for group in grouped]
    columns = dict.fromkeys(name for group in last for run in group for name in run)
    out = {}
    for name in columns:
        cells = []
        for group in last:
            values = [run[name] for run in group if isinstance(run.get(name), int | float)]
            cells.append(
                str(mean(values)) if values and isinstance(values[0], float) else (str(values[0]) if values else "")
            )
        out[name.removeprefix("eval/")] = cells
    return out


def retrieval(results: Mapping[str, list[str]], names: Sequence[str]) -> dict[str, Table]:
    """A table for each split, as papers print them: rows are scores of each group, columns the recalls both ways."""
    splits: dict[str, dict[str, dict[str, list[str]]]] = {}  # split -> score -> column -> a cell for each group
    for name, cells in results.items():
        found = RECALL.fullmatch(name)
        if found:
            split, score, column = found.groups()
            splits.setdefault(split, {}).setdefault(score, {})[column] = cells
    out = {}
    for split, scores in splits.items():
        columns = sorted(dict.fromkeys(column for score in scores.values() for column in score), key=_column_order)
        rows = {}
        for score in sorted(scores, key=lambda score: score == "chance"):  # chance comes last
            for g, name in enumerate(names):
                label = score if len(names) == 1 else f"{score}: {name}"
                rows[label] = [scores[score][column][g] if column in scores[score] else "" for column in columns]
        out[split] = Table([_head(column) for column in columns], rows)
    return out


def _column_order(column: str) -> tuple[bool, str, int]:
    way, _, k = column.partition("_r")
    return column == "mean_recall", way, int(k) if k.isdigit() else 0


def _head(column: str) -> str:
    """ "i2t_r1" -> "image to text R@1"."""
    if column == "mean_recall":
        return "mean recall"
    way, _, k = column.partition("_r")
    return f"{WAYS[way]} R@{k}"


def memory(content: dict[str, Any]) -> dict[str, tuple[str, str]]:
    """Predicted and measured bytes of each category and in total."""
    predicted, measured = content.get("prediction") or {}, content.get("measurement") or {}
    rows = {}
    for part in ("categories", "totals"):
        names = dict.fromkeys([*predicted.get(part, {}), *measured.get(part, {})])
        for name in names:
            cells = [figures.get(part, {}).get(name) for figures in (predicted, measured)]
            rows[name] = tuple("" if value is None else f"{value:,}" for value in cells)
    return rows  # type: ignore[return-value]


def phases(grouped: Sequence[Sequence[RunFiles]]) -> dict[str, list[str]]:
    """The last logged shares of a step's phases, and the speed, a cell for each group of runs."""
    out: dict[str, list[str]] = {}
    names = dict.fromkeys(
        name for group in grouped for run in group for line in run.metrics for name in line
        if name.startswith("time/") or name in ("pairs_per_s", "tflops", "mfu")
    )  # fmt: skip
    for name in names:
        cells = []
        for group in grouped:
            values = [curve[-1] for run in group if (curve := run.curve(name)[1])]
            cells.append(str(mean(values)) if values else "")
        out[name] = cells
    return out
