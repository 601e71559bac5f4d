"""The report's charts as SVG, in the page's own colours: every matching column is drawn.

Of one run a chart shows columns that belong together; of several runs each column has its chart,
with a line for each run. Where nothing has more than one point, bars take the place of lines.
"""

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from ds_cmli.common import plots
from ds_cmli.common.plots import apart, matplotlib
from ds_cmli.report.results import CHANCE, RECALL, WAYS
from ds_cmli.report.runs import RunContent, columns_of

GROUPS = {  # title -> regular expression of its columns
    "Retrieval, R@1": r"eval/.*_r1",
    "Pointing-game accuracy": r"eval/.*pointing.*",
    "Losses": r"loss(/.*)?",
    "Temperatures": r"temperature/.*",
    "Learning rate": r"lr(/.*)?",
    "Gradient norm": r"grad_norm",
    "Speed": r"pairs_per_s",
}
INK = "#010203"  # becomes the page's text colour, on light and on dark paper
SIZE = (4.6, 2.7)  # inches
LABEL = 9  # points
# Characters of a name next to a line; of longer ones their numbers on the page stand there.
LONGEST = 14


@dataclass
class Series:
    label: str
    colour: str
    style: str
    steps: list[int]
    values: list[float]


@dataclass
class Chart:
    title: str
    series: list[Series] = field(default_factory=list)
    chance: float | None = None


def charts(runs: Sequence[RunContent]) -> dict[str, str]:
    """The title of each chart -> SVG."""
    out = {}
    for group, pattern in GROUPS.items():
        group_charts = chosen(runs, pattern)
        for chart in group_charts:
            title = group if len(group_charts) == 1 else f"{group}: {chart.title}"
            out[title] = draw(chart)
    return out


def chosen(runs: Sequence[RunContent], pattern: str) -> list[Chart]:
    """The charts of the columns that match."""
    by_title: dict[str, Chart] = {}
    several = len(runs) > 1
    short = max(len(run.name) for run in runs) <= LONGEST
    for column in columns_of(runs):
        if not re.fullmatch(pattern, column) or f"/{CHANCE}/" in column:
            continue
        title, label = named(column)
        if several:
            title = f"{title}, {label}"
        for number, run in enumerate(runs):
            steps, values = run.curve(column)
            if not steps:
                continue
            chart = by_title.setdefault(title, Chart(title, chance=chance(runs, column)))
            if several:
                label = run.name if short else str(number + 1)
                colour, style = plots.line(number)
            else:
                colour, style = plots.line(len(chart.series))
            chart.series.append(Series(label, colour, style, steps, values))
    return list(by_title.values())


def named(column: str) -> tuple[str, str]:
    """The title of a column's chart, and the column's label in it."""
    recall = RECALL.fullmatch(column.removeprefix("eval/"))
    if recall:
        split, score, metric = recall.groups()
        return f"{split}, {WAYS[metric.partition('_')[0]]}", score
    group, _, rest = column.partition("/")
    if group == "eval":
        return "by split", rest.partition("/")[0]
    return group, rest or ("total" if group == "loss" else group)


def chance(runs: Sequence[RunContent], column: str) -> float | None:
    """The result of guessing, where the runs have written it with a recall."""
    recall = RECALL.fullmatch(column)
    values = runs[0].curve(f"{recall[1]}/{CHANCE}/{recall[3]}")[1] if recall else []
    return next(reversed(values), None)


def draw(chart: Chart) -> str:
    """The chart as an SVG element without size and colours of its own paper."""
    pyplot = matplotlib("the report, for its curves,")
    figure, axis = pyplot.subplots(figsize=SIZE, layout="constrained")
    if all(len(series.steps) == 1 for series in chart.series):
        _bars(figure, axis, chart)
    else:
        _lines(axis, chart)
    for axle in (axis.xaxis, axis.yaxis):
        axle.label.set_color(INK)
    axis.tick_params(colors=INK, labelsize=LABEL)
    for spine in axis.spines.values():
        spine.set_edgecolor(INK)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True)
    pyplot.close(figure)
    text = buffer.getvalue()
    return text[text.index("<svg") :].replace(INK, "currentColor")


def _bars(figure, axis, chart: Chart) -> None:
    names = [series.label for series in chart.series]
    values = [series.values[0] for series in chart.series]
    figure.set_figheight(0.5 + 0.3 * len(names))
    places = range(len(names))
    bars = axis.barh(places, values, height=0.7, color=[series.colour for series in chart.series])
    form = ".3g" if max(values) > 1 else ".3f"
    axis.bar_label(bars, fmt=f"{{:{form}}}", padding=3, color=INK, fontsize=LABEL)
    axis.set_yticks(places, names)
    axis.invert_yaxis()
    axis.margins(x=0.15)
    axis.xaxis.set_visible(False)
    axis.spines["bottom"].set_visible(False)
    if chart.chance is not None:
        axis.axvline(chart.chance, color=INK, linestyle=":", linewidth=1)


def _lines(axis, chart: Chart) -> None:
    for series in chart.series:
        marker = "o" if len(series.steps) < 8 else None
        look = {"color": series.colour, "marker": marker, "markersize": 3}
        axis.plot(series.steps, series.values, series.style, **look)
    if chart.chance is not None:
        axis.axhline(chart.chance, color=INK, linestyle=":", linewidth=1)
    axis.set_xlabel("optimizer steps", fontsize=LABEL)
    axis.grid(axis="y")
    axis.locator_params(nbins=5)
    if len(chart.series) == 1:
        return  # the title says it all
    low, high = axis.get_ylim()
    gap = 1.25 * LABEL / 72 / (SIZE[1] * 0.75) * (high - low)
    ends = apart([series.values[-1] for series in chart.series], gap)
    for series, end in zip(chart.series, ends, strict=True):
        at = axis.get_yaxis_transform()
        axis.text(1.02, end, series.label, transform=at, color=INK, fontsize=LABEL, va="center")
        axis.plot(1.01, end, ".", transform=at, color=series.colour, clip_on=False)
