"""The results of evaluations as text, and a run's best result, without importing torch."""

from collections.abc import Mapping
from itertools import product
from typing import Any, TypeVar

Metrics = dict[str, Any]  # numbers by name, and `left_out_first`, the names of samples
Metric = TypeVar("Metric")

SCORES = ("combined", "cmli", "global")
POINTING_CHANCE = 0.25  # each picture of a scene fills a quarter of it


def best(before: Metrics, split: str, figures: Metrics, step: int) -> Metrics:
    """The best result of a run so far.

    This is the one `found` if it has the metric of `before` and a higher value, else `before`.
    """
    score = next(score for score in SCORES if f"{score}/i2t_r1" in figures)
    metric, value = f"{split} {score} R@1", _mean_r1(figures, score)
    if before.get("metric", metric) != metric or value <= before.get("value", -1.0):
        return before
    return {
        "metric": metric,
        "value": value,
        "step": step,
        "pairs": figures["pairs"],
        "chance": _mean_r1(figures, "chance"),
    }


def _mean_r1(figures: Metrics, score: str) -> float:
    return (figures[f"{score}/i2t_r1"] + figures[f"{score}/t2i_r1"]) / 2


def summary(split: str, figures: Metrics) -> str:
    """The result of one split as a table of less than 80 columns.

    It has each score both ways, chance, and the pointing game.
    """
    width = len("fold/combined")
    parts = [
        f"  {split} {figures['pairs']} pairs, {figures['pictures']} pictures{left_out(figures)}",
        f"    {'':{width}}  {'image to text':19}   {'text to image':19}    mean",
        f"    {'':{width}}  {'R@1    R@5    R@10':19}   {'R@1    R@5    R@10':19}  recall",
    ]
    for prefix, score in product(("", "fold/"), (*SCORES, "chance")):
        name = prefix + score
        if f"{name}/i2t_r1" not in figures:
            continue
        row = f"    {name:{width}}"
        for way in ("i2t", "t2i"):
            row += "".join(f"  {figures[f'{name}/{way}_r{k}']:.3f}" for k in (1, 5, 10))
            row += " " if way == "i2t" else f"   {figures[f'{name}/mean_recall']:.3f}"
        parts.append(row)
    if "pointing_game" in figures:
        accuracy = f"{figures['pointing_game']:.3f} (chance {POINTING_CHANCE})"
        parts.append(f"    pointing-game accuracy {accuracy}")
    return "\n".join(parts)


def prefixed(prefix: str, metrics: Mapping[str, Metric]) -> dict[str, Metric]:
    """The metrics with a prefix before their names."""
    return {f"{prefix}{name}": value for name, value in metrics.items()}


def left_out(figures: Metrics) -> str:
    if "left_out" not in figures:
        return ""
    return f", {figures['left_out']} left out: {', '.join(figures['left_out_first'])}"


def classification(figures: Metrics) -> str:
    """The result of zero-shot classification as lines of a table."""
    parts = [f"  {figures['pictures']} pictures, {figures['classes']} classes{left_out(figures)}"]
    for score in (*SCORES, "chance"):
        if f"{score}/top1" in figures:
            row = f"  {score:<8} top-1 {figures[f'{score}/top1']:.3f}"
            row += f"  top-5 {figures[f'{score}/top5']:.3f}"
            if score != "chance":
                row += f"  mean per class {figures[f'{score}/mean_per_class']:.3f}"
            parts.append(row)
    return "\n".join(parts)


def pointing(game: Metrics) -> str:
    """The result of the pointing game with boxes, as two lines."""
    visible = f"{game['visible']:.0%} of them have a box that holds the centre of a patch"
    accuracy, chance = game["pointing_game"], game["chance/pointing_game"]
    return (
        f"  {game['phrases']} phrases, {game['pictures']} pictures, {visible}{left_out(game)}\n"
        f"  pointing-game accuracy {accuracy:.3f} (chance {chance:.3f})"
    )
