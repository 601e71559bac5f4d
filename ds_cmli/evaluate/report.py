"""The results of evaluations as text, and the best result of a run. This module does not import torch."""

from typing import Any

SCORES = ("combined", "cmli", "global")
POINTING_CHANCE = 0.25  # each picture of a scene fills a quarter of it


def best(before: dict[str, Any], split: str, found: dict[str, Any], step: int) -> dict[str, Any]:
    """The best result of a run so far: this one if it has the metric of `before` and a higher value, else `before`."""
    score = next(s for s in SCORES if f"{s}/i2t_r1" in found)
    metric, value = (
        f"{split} {score} R@1",
        (found[f"{score}/i2t_r1"] + found[f"{score}/t2i_r1"]) / 2,
    )
    if before.get("metric", metric) != metric or value <= before.get("value", -1.0):
        return before
    chance = (found["chance/i2t_r1"] + found["chance/t2i_r1"]) / 2
    return {
        "metric": metric,
        "value": value,
        "step": step,
        "pairs": found["pairs"],
        "chance": chance,
    }


def summary(split: str, found: dict[str, Any]) -> str:
    """The result of one split as a table of less than 80 columns: each score both ways, chance, pointing game."""
    width = len("fold/combined")
    parts = [
        f"  {split} {found['pairs']} pairs, {found['pictures']} pictures{left_out(found)}",
        f"    {'':{width}}  {'image to text':19}   {'text to image':19}    mean",
        f"    {'':{width}}  {'R@1    R@5    R@10':19}   {'R@1    R@5    R@10':19}  recall",
    ]
    for prefix in ("", "fold/"):
        for score in (*SCORES, "chance"):
            name = f"{prefix}{score}"
            if f"{name}/i2t_r1" not in found:
                continue
            ways = [
                "  ".join(f"{found[f'{name}/{way}_r{k}']:.3f}" for k in (1, 5, 10))
                for way in ("i2t", "t2i")
            ]
            parts.append(
                f"    {name:{width}}  {'   '.join(ways)}   {found[f'{name}/mean_recall']:.3f}"
            )
    if "pointing_game" in found:
        parts.append(
            f"    pointing-game accuracy {found['pointing_game']:.3f} (chance {POINTING_CHANCE})"
        )
    return "\n".join(parts)


def left_out(found: dict[str, Any]) -> str:
    return (
        f", {found['left_out']} left out: {', '.join(found['left_out_first'])}"
        if "left_out" in found
        else ""
    )


def classification(found: dict[str, Any]) -> str:
    """The result of zero-shot classification as lines of a table."""
    parts = [f"  {found['pictures']} pictures, {found['classes']} classes{left_out(found)}"]
    for score in SCORES:
        if f"{score}/top1" in found:
            top1, top5, mean = (
                found[f"{score}/{name}"] for name in ("top1", "top5", "mean_per_class")
            )
            parts.append(
                f"  {score:<8} top-1 {top1:.3f}  top-5 {top5:.3f}  mean per class {mean:.3f}"
            )
    return "\n".join(
        [*parts, f"  chance   top-1 {found['chance/top1']:.3f}  top-5 {found['chance/top5']:.3f}"]
    )


def pointing(found: dict[str, Any]) -> str:
    """The result of the pointing game with boxes, as two lines."""
    visible = f"{found['visible']:.0%} of them have a box that holds the centre of a patch"
    return (
        f"  {found['phrases']} phrases, {found['pictures']} pictures, {visible}{left_out(found)}\n"
        f"  pointing-game accuracy {found['pointing_game']:.3f} (chance {found['chance/pointing_game']:.3f})"
    )
