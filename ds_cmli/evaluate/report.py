"""The results of evaluations as text, and a run's best result, without importing torch."""

from typing import Any

Metrics = dict[str, Any]  # numbers by name, and `left_out_first`, the names of samples
SCORES = ("combined", "cmli", "global")
COUNTS = ("pairs", "choices", "phrases", "pictures", "classes")


def prefixed(prefix: str, metrics: Metrics) -> Metrics:
    return {f"{prefix}{name}": value for name, value in metrics.items()}


def best(before: Metrics, split: str, figures: Metrics, step: int) -> Metrics:
    """The best result of a run: this one, unless `before` has another metric or a higher value."""
    score = next(score for score in SCORES if f"{score}/i2t_r1" in figures)
    ways = ((f"{kind}/i2t_r1", f"{kind}/t2i_r1") for kind in (score, "chance"))
    value, chance = ((figures[i2t] + figures[t2i]) / 2 for i2t, t2i in ways)
    metric = f"{split} {score} R@1"
    if before.get("metric", metric) != metric or value <= before.get("value", -1.0):
        return before
    size = {"pairs": figures["pairs"], "chance": chance}
    return {"metric": metric, "value": value, "step": step, **size}


def summary(figures: Metrics, precision: str, name: str = "") -> str:
    """What was measured, and a table of less than 80 columns with a row of each score."""
    heading = ", ".join(f"{figures[count]} {count}" for count in COUNTS if count in figures)
    lines = [" ".join(filter(None, (" ", name, heading))) + f", in {precision}"]
    if "left_out" in figures:
        lines[0] += f", {figures['left_out']} left out: {', '.join(figures['left_out_first'])}"
    columns = [key.removeprefix("global/") for key in figures if key.startswith("global/")]
    if columns:
        lines.append(f"{'':12}" + "".join(f"  {column:5}" for column in columns))
    for score in (*SCORES, "chance"):
        cells = [(figures.get(f"{score}/{column}"), len(column)) for column in columns]
        texts = [f"  {'' if x is None else f'{x:.3f}':{max(5, width)}}" for x, width in cells]
        if any(map(str.strip, texts)):
            lines.append(f"    {score:8}{''.join(texts)}".rstrip())
    if "pointing_game" in figures:
        chance = figures.get("chance/pointing_game", 0.25)  # of scenes, with pictures in quarters
        lines.append(
            f"    pointing-game accuracy {figures['pointing_game']:.3f} (chance {chance:.3g})"
        )
    if "visible" in figures:
        lines[-1] += f"; {figures['visible']:.0%} of the phrases are in sight"
    return "\n".join(lines)
