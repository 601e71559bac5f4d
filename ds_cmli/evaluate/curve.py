"""Retrieval over the share of the way from a source's weights to the trained ones."""

from typing import TYPE_CHECKING

from ds_cmli.common import plots
from ds_cmli.common.cli import say
from ds_cmli.distributed import process_group as distributed
from ds_cmli.evaluate.embed import EmbedSettings
from ds_cmli.evaluate.report import SCORES, Metrics, prefixed
from ds_cmli.evaluate.split import evaluate_split

if TYPE_CHECKING:
    from ds_cmli.checkpoint.interpolation import Ends
    from ds_cmli.data.load import EvalData
    from ds_cmli.losses.objective import Objective

SHARES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
SIZE = (7, 4)  # inches
MEASURE = "mean_recall"
Curves = dict[str, list[float]]  # "split score" -> the mean recall at each share


def draw_curve(
    path: str, ends: "Ends", objective: "Objective", data: "EvalData", how: EmbedSettings
) -> Metrics:
    """Measure at each share, print a table and draw its mean recalls. Collective.

    Args:
        path: of the picture, in the format that its ending names.
        objective: its weights are those of the last share, the trained ones, afterwards.

    Returns:
        The metrics of `evaluate_split` with the prefix "share/0.1/eval/SPLIT/", as of each share.
    """
    metrics: Metrics = {}
    curves: Curves = {}
    for share in SHARES:
        ends.put_between(objective, share)
        for split, dataset in data.evals.items():
            figures = evaluate_split(objective, dataset, data, how)  # collective
            metrics |= prefixed(f"share/{share:g}/eval/{split}/", figures)
            for score in SCORES:
                if f"{score}/{MEASURE}" in figures:
                    values = curves.setdefault(f"{split} {score}", [])
                    values.append(figures[f"{score}/{MEASURE}"])
    say(table(curves))
    if distributed.is_main():
        _draw(path, curves)
        say(f"{path}: mean recall over the share of the trained weights")
    return metrics


def table(curves: Curves) -> str:
    """A row for each share, with a star at the first best of each column."""
    widths = {name: max(len(name), 6) for name in curves}
    head = "".join(f"  {name:>{width}}" for name, width in widths.items())
    rows = ["  mean recall over the share of the trained weights", f"    share{head}"]
    for number, share in enumerate(SHARES):
        row = f"    {share:5g}"
        for name, values in curves.items():
            star = "*" if number == values.index(max(values)) else " "
            row += f"  {f'{values[number]:.3f}{star}':>{widths[name]}}"
        rows.append(row)
    return "\n".join(rows)


def _draw(path: str, curves: Curves) -> None:
    pyplot = plots.matplotlib("--curve")
    figure, axis = pyplot.subplots(figsize=SIZE, layout="constrained")
    for number, (name, values) in enumerate(curves.items()):
        colour, dashes = plots.line(number)
        axis.plot(SHARES, values, color=colour, linestyle=dashes, marker=".", label=name)
    axis.set(
        xlabel="share of the trained weights; 0: student.source, 1: the run",
        ylabel="mean recall",
    )
    axis.grid(True)
    figure.legend(loc="outside right upper", frameon=False)
    figure.savefig(path)
    pyplot.close(figure)
