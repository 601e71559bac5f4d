"""Writes the report's page: results first, then what runs differ in, charts, match maps, speed,
memory and settings.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ds_cmli.common import plots
from ds_cmli.common.documents import write_page
from ds_cmli.memory.report import COLOURS
from ds_cmli.report.charts import GROUPS, charts
from ds_cmli.report.maps import match_maps
from ds_cmli.report.results import headline, last_values, others, retrieval
from ds_cmli.report.runs import RunFiles, differing, groups, mean

SPEED = ("pairs_per_s", "tflops", "mfu")
SHARES = ("time/", "mfu")  # columns that are shares


def write(runs: Sequence[RunFiles], path: str | Path) -> None:
    """Write the page; raises `UserError` if matplotlib is missing or the file cannot be written."""
    grouped = groups(runs)
    names = [", ".join(run.name for run in group) for group in grouped]
    results = last_values(grouped)
    tables = retrieval(results, names)
    values = {
        "title": f"Report: {names[0]}" if len(names) == 1 else f"Report of {len(runs)} runs",
        "names": names,
        "keys": {run.name: plots.line(number)[0] for number, run in enumerate(runs)},
        "headlines": {split: headline(results, split) for split in tables}
        if len(names) == 1
        else {},
        "retrieval": tables,
        "results": others(results),
        "charts": charts(runs),
        "maps": {run.name: found for run in runs if (found := match_maps(run.folder))},
        "differing": differing([group[0] for group in grouped]) if len(grouped) > 1 else {},
        "memory": {run.name: memory(run.memory) for run in runs if run.memory},
        "colours": COLOURS,
        "phases": phases(grouped),
        "rest": rest(grouped),
        "settings": runs[0].settings,
    }
    write_page(path, "--output", "ds_cmli.report", "report.html.jinja", **values)


def memory(content: Mapping[str, Any]) -> dict[str, list[str]]:
    """Predicted and measured bytes of each category and in total."""
    predicted, measured = content.get("prediction") or {}, content.get("measurement") or {}
    rows = {}
    for part in ("categories", "totals"):
        for name in dict.fromkeys([*predicted.get(part, {}), *measured.get(part, {})]):
            cells = [figures.get(part, {}).get(name) for figures in (predicted, measured)]
            if any(cells):
                rows[name] = ["" if value is None else f"{value:,}" for value in cells]
    return rows


def phases(grouped: Sequence[Sequence[RunFiles]]) -> dict[str, list[str]]:
    """The last logged speed and shares of a step's phases, a cell for each group of runs."""
    return _last(
        grouped, [name for name in _columns(grouped) if name in SPEED or name.startswith("time/")]
    )


def rest(grouped: Sequence[Sequence[RunFiles]]) -> dict[str, list[str]]:
    """The last values of all columns that stand nowhere else on the page."""
    shown = "|".join([*GROUPS.values(), "step", "time/.*", *SPEED, "eval/.*"])
    return _last(grouped, [name for name in _columns(grouped) if not re.fullmatch(shown, name)])


def _columns(grouped: Sequence[Sequence[RunFiles]]) -> dict[str, None]:
    return dict.fromkeys(
        name for group in grouped for run in group for line in run.metrics for name in line
    )


def _last(grouped: Sequence[Sequence[RunFiles]], names: Sequence[str]) -> dict[str, list[str]]:
    out: dict[str, list[str]] = {}
    for name in names:
        cells = []
        for group in grouped:
            values = [curve[-1] for run in group if (curve := run.curve(name)[1])]
            cells.append(mean(values).shown(share=name.startswith(SHARES)) if values else "")
        out[name] = cells
    return out
