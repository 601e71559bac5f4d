"""`python -m ds_cmli.report RUN [RUN ...]` writes one or several runs as one HTML file.

Results come first, then what runs differ in, charts, match maps, speed, memory and settings.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ds_cmli.common import documents, plots
from ds_cmli.common.cli import check_writable, run_command
from ds_cmli.config.plugins import plugin_option
from ds_cmli.memory.report import COLOURS

if TYPE_CHECKING:
    from ds_cmli.report.runs import RunContent

SPEED = ("pairs_per_s", "tflops", "mfu")
SHARES = ("time/", "mfu")  # columns that are shares


@click.command()
@plugin_option
@click.argument("runs", nargs=-1, required=True, metavar="RUN [RUN ...]")
@click.option("--output", default="report.html", show_default=True, help="HTML page to write.")
def command(runs: tuple[str, ...], output: str) -> None:
    """Write one page about runs; those that differ by their seed alone count as one, with standard
    errors."""
    check_writable(output)
    from ds_cmli.report.runs import read_all

    write(read_all(runs), output)
    click.echo(f"report of {len(runs)} run{'s' if len(runs) > 1 else ''}: {output}")


def write(runs: Sequence["RunContent"], path: str | Path) -> None:
    """Write the page; raises `UserError` if matplotlib is missing or the file cannot be written."""
    from ds_cmli.report.charts import GROUPS, charts
    from ds_cmli.report.results import headline, last_values, others, retrieval
    from ds_cmli.report.runs import columns_of, differing, group_name, groups

    grouped = groups(runs)
    names = list(map(group_name, grouped))
    results = last_values(grouped)
    tables = retrieval(results, names)
    speed, rest = [], []
    elsewhere = "|".join([*GROUPS.values(), "step", "eval/.*"])
    for column in columns_of(runs):
        if column in SPEED or column.startswith("time/"):
            speed.append(column)
        elif not re.fullmatch(elsewhere, column):
            rest.append(column)
    values: dict[str, Any] = {
        "title": f"Report of {len(runs)} runs",
        "names": names,
        "keys": {run.name: plots.line(number)[0] for number, run in enumerate(runs)},
        "headlines": {},
        "retrieval": tables,
        "results": others(results),
        "charts": charts(runs),
        "maps": {},
        "differing": {},
        "memory": {run.name: memory(run.memory) for run in runs if run.memory},
        "colours": COLOURS,
        "phases": _last(grouped, speed),
        "rest": _last(grouped, rest),
        "settings": runs[0].settings,
    }
    if len(names) == 1:
        values["title"] = f"Report: {names[0]}"
        values["headlines"] = {split: headline(results, split) for split in tables}
    else:
        values["differing"] = differing([group[0] for group in grouped])
    for run in runs:
        pictures = match_maps(run.folder)
        if pictures:
            values["maps"][run.name] = pictures
    documents.write_page(path, "--output", "ds_cmli.report", "report.html.jinja", **values)


def memory(content: Mapping[str, Any]) -> dict[str, list[str]]:
    """Predicted and measured bytes of each category and in total."""
    predicted, measured = content.get("prediction") or {}, content.get("measurement") or {}
    rows = {}
    for part in ("categories", "totals"):
        for name in dict.fromkeys([*predicted.get(part, {}), *measured.get(part, {})]):
            cells = []
            for figures in (predicted, measured):
                value = figures.get(part, {}).get(name)
                cells.append("" if value is None else f"{value:,}")
            if any(cell not in ("", "0") for cell in cells):
                rows[name] = cells
    return rows


def _last(
    grouped: Sequence[Sequence["RunContent"]], columns: Sequence[str]
) -> dict[str, list[str]]:
    """The last value of each column, a cell for each group of runs."""
    from ds_cmli.report.runs import mean

    out: dict[str, list[str]] = {}
    for name in columns:
        out[name] = []
        for group in grouped:
            curves = [run.curve(name)[1] for run in group]
            values = [curve[-1] for curve in curves if curve]
            shown = mean(values).shown(share=name.startswith(SHARES)) if values else ""
            out[name].append(shown)
    return out


def match_maps(folder: Path) -> dict[str, str]:
    """The last picture of each held-out pair that the run has written for TensorBoard.

    Returns:
        "<pair>, step <step>" -> `data:` URL; empty if the run wrote none.
    """

    events = folder / "tensorboard"
    if not any(events.glob("events.*")):
        return {}
    from tensorboard.backend.event_processing import event_accumulator

    # Only the last of each is kept.
    kept = {event_accumulator.IMAGES: 1, event_accumulator.SCALARS: 1, event_accumulator.TENSORS: 1}
    accumulator = event_accumulator.EventAccumulator(str(events), kept)
    accumulator.Reload()
    out = {}
    for tag in accumulator.Tags()["images"]:
        if tag.startswith("match-maps/"):
            image = accumulator.Images(tag)[-1]
            name = f"{tag.removeprefix('match-maps/')}, step {image.step}"
            out[name] = documents.data_url(image.encoded_image_string, "png")
    return out


def main() -> None:
    run_command(command)


if __name__ == "__main__":
    main()
