"""Metrics by name, their table, and a run's best result."""

from typing import Any

from ds_cmli.commands import noun

Metrics = dict[str, Any]  # numbers by name, and `left_out_first`, the names of samples
SCORES = ("combined", "cmli", "global")  # the first one that a model has decides
COUNTED = ("pair", "choice", "phrase", "picture", "class")


def prefixed(prefix: str, metrics: Metrics) -> Metrics:
    return {f"{prefix}{name}": value for name, value in metrics.items()}


def best_result(best: Metrics, data: str, metrics: Metrics, step: int) -> Metrics:
    """Return the best result of a run: `metrics`, unless `best` is of the same metric and better.

    It is R@1 of retrieval, the mean of both directions, or accuracy of zero-shot classification.
    """
    is_retrieval = "global/i2t_r1" in metrics
    names = ("i2t_r1", "t2i_r1") if is_retrieval else ("top1",)
    score = next(score for score in SCORES if f"{score}/{names[0]}" in metrics)
    value, chance = (
        sum(metrics[f"{kind}/{name}"] for name in names) / len(names) for kind in (score, "chance")
    )
    metric = f"{data} {score} {'R@1' if is_retrieval else 'top-1 accuracy'}"
    if best.get("metric") == metric and value <= best["value"]:
        return best
    counted = "pair" if is_retrieval else "picture"
    number = metrics[f"{counted}s"]
    size = f"{'mean of both ways; ' if is_retrieval else ''}{number} {noun(number, counted)}"
    return {"metric": metric, "value": value, "step": step, "size": size, "chance": chance}


def summary(metrics: Metrics, precision: str, name: str = "") -> str:
    """Return a line of what was measured, and a table of less than 80 columns, a row a score."""
    lines = [_heading(metrics, precision, name), *_table(metrics)]
    accuracy = metrics.get("pointing_game")
    if accuracy is not None:
        chance = metrics.get("chance/pointing_game", 0.25)  # of scenes, with pictures in quarters
        lines.append(f"    pointing-game accuracy {accuracy:.3f} (chance {chance:.3g})")
    if "visible" in metrics:
        lines[-1] += f"; {metrics['visible']:.0%} of the phrases are in sight"
    return "\n".join(lines)


def _heading(metrics: Metrics, precision: str, name: str) -> str:
    counts = [(metrics.get(noun(0, counted)), counted) for counted in COUNTED]
    listed = ", ".join(f"{n} {noun(n, counted)}" for n, counted in counts if n is not None)
    heading = f"  {name} {listed}" if name else f"  {listed}"
    if "left_out" not in metrics:
        return f"{heading}, in {precision}"
    names = ", ".join(metrics["left_out_first"])
    return f"{heading}, in {precision}, {metrics['left_out']} left out: {names}"


def _table(metrics: Metrics) -> list[str]:
    columns = [key.removeprefix("global/") for key in metrics if key.startswith("global/")]
    if not columns:
        return []
    lines = [f"{'':12}" + "".join(f"  {column:5}" for column in columns)]
    for score in (*SCORES, "chance"):
        cells = []
        for column in columns:
            value = metrics.get(f"{score}/{column}")
            number = "" if value is None else f"{value:.3f}"
            cells.append(f"  {number:{max(5, len(column))}}")
        if any(cell.strip() for cell in cells):
            lines.append(f"    {score:8}{''.join(cells)}".rstrip())
    return lines
