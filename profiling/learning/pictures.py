"""The pictures of an ablation: its differences, and a logged column of its runs over the steps."""

from collections.abc import Sequence
from pathlib import Path
from textwrap import fill

from ds_cmli.common import plots
from ds_cmli.common.errors import UserError, nearest
from ds_cmli.report.runs import columns_of, read
from profiling.learning.plan import Run
from profiling.learning.report import Compared
from profiling.scripts import NARROW, picture, plain, written

LABEL = 24  # characters in a line of a contrast's label
FAR = 5  # times the median difference


def draw_differences(compared: Sequence[Compared], path: str) -> None:
    """Draw each contrast that has runs, in the plan's first endpoint.

    Seeds are dots, with the mean and its 95% interval. Planned contrasts have a colour, exploratory
    ones are grey. Contrasts with a label are drawn alone, if there are any. Where one difference is
    far larger than the others, the scale is logarithmic beyond these.
    """
    endpoint = compared[0].endpoint if compared else ""
    labelled = [one for one in compared if one.contrast.label]
    compared = [one for one in labelled or compared if one.by_seed and one.endpoint == endpoint]
    labels = [fill(one.contrast.label or str(one.contrast), LABEL) for one in compared]
    height = 1.6 + sum(0.3 + 0.16 * label.count("\n") for label in labels)
    figure, axis = picture(height, width=NARROW)
    for row, one in enumerate(compared):
        colour = plots.ACCENT if one.contrast.planned else plots.SOFT
        dots = list(one.by_seed.values())
        axis.plot(dots, [row] * len(dots), "o", color=colour, alpha=0.4, markersize=4)
        if one.contrast.equivalence is not None:
            for end in (-one.contrast.equivalence, one.contrast.equivalence):
                axis.plot([end, end], [row - 0.3, row + 0.3], ":", color=plots.SOFT)
        if one.found is not None:
            axis.plot(one.found.interval, [row + 0.2] * 2, color=colour, linewidth=2)
            axis.plot(one.found.mean, row + 0.2, "D", color=colour, markersize=5)
    axis.axvline(0, color=plots.SOFT, linewidth=0.8)
    axis.set_yticks(range(len(compared)), labels)
    sizes = sorted(max(map(abs, one.by_seed.values())) for one in compared)
    caption = "dots: seeds; line: mean, 95% interval"
    if {one.contrast.planned for one in compared} == {True, False}:
        caption += "\ncoloured: planned; grey: exploratory"
    if any(one.contrast.equivalence is not None for one in compared):
        caption += "\ndotted: margin of equivalence"
    if sizes and sizes[-1] > FAR * sizes[len(sizes) // 2]:
        end = 2 * sizes[len(sizes) // 2]
        axis.set_xscale("symlog", linthresh=end, linscale=3)
        axis.xaxis.set_major_formatter(plain)
        axis.set_xlabel(f"logarithmic beyond ±{end:.2g}")
    axis.invert_yaxis()
    axis.grid(axis="x")
    shown = sum(one.shown for one in compared)
    finding = f"{shown} of {len(compared)} differences are shown\nin {endpoint}"
    written(figure, path, finding, caption)


def draw_column(column: str, runs: Sequence[Run], out: Path, path: str) -> None:
    """Draw a logged column over the steps, a line a run and a colour an arm.

    Raises `UserError` if no run that lies in `out` has it.
    """
    files = {run.name: read(out / run.name) for run in runs if (out / run.name).is_dir()}
    known = columns_of(list(files.values()))
    if column not in known:
        hint = nearest(column, known) if known else f"no run lies in {out}"
        raise UserError(f"--curve is {column!r}, which no run has logged: {hint}")
    figure, axis = picture(4)
    arms = list(dict.fromkeys(run.arm for run in runs))
    named = set[str]()
    for run in runs:
        steps, values = files[run.name].curve(column) if run.name in files else ([], [])
        if steps:
            colour, dashes = plots.line(arms.index(run.arm))
            label = None if run.arm in named else run.arm
            named.add(run.arm)
            axis.plot(steps, values, dashes, color=colour, alpha=0.7, label=label)
    axis.set_xlabel("step")
    axis.grid(axis="y")
    axis.legend(frameon=False)
    written(figure, path, f"{column} of each run, over its steps")
