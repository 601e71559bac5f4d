"""The tables of results: retrieval as papers print it, and every other held-out metric."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ds_cmli.report.runs import RunContent, mean, measured_on

# Split, score and metric of a column.
RECALL = re.compile(r"(.+)/([^/]+)/((?:i2t|t2i)_r\d+|mean_recall)")
WAYS = {"i2t": "image to text", "t2i": "text to image"}
CHANCE = "chance"
# Of metrics that are no recalls: more is better.
ACCURACY = re.compile(r"(?!.*chance).*pointing_game")


@dataclass
class Cell:
    text: str = ""
    value: float | None = None
    best: bool = False
    pairs: tuple[str, str] = ("", "")  # what identifies those on which it is measured

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class RecallTable:
    heads: dict[str, list[str]]  # way -> its columns
    rows: dict[str, list[Cell]]


def last_values(grouped: Sequence[Sequence[RunContent]]) -> dict[str, list[Cell]]:
    """The last value of each metric: for each group of runs their mean and its standard error."""
    by_group: dict[str, dict[int, list[object]]] = {}  # name -> number of the group -> values
    for number, group in enumerate(grouped):
        for run in group:
            for name, value in run.last("eval/").items():
                by_group.setdefault(name, {}).setdefault(number, []).append(value)
    out: dict[str, list[Cell]] = {}
    for name, values in by_group.items():
        cells = [_cell(name, values.get(number, [])) for number in range(len(grouped))]
        out[name.removeprefix("eval/")] = cells
    data = [measured_on(group[0]) for group in grouped]
    for name, cells in out.items():
        recall = RECALL.fullmatch(name)
        split = recall[1] if recall else name.rpartition("/")[0]
        counts = out.get(f"{split}/pairs", [Cell()] * len(cells))
        for cell, count, source in zip(cells, counts, data, strict=True):
            cell.pairs = (count.text, source)
    return out


def _cell(name: str, values: Sequence[object]) -> Cell:
    numbers = [value for value in values if isinstance(value, int | float)]
    share = RECALL.fullmatch(name) or float in map(type, numbers)
    if numbers and (share or len(set(numbers)) > 1):
        average = mean(numbers)
        return Cell(str(average), average.value)
    if not values:
        return Cell()
    shown = values[0]
    return Cell(", ".join(map(str, shown)) if isinstance(shown, list) else str(shown))


def retrieval(results: Mapping[str, list[Cell]], names: Sequence[str]) -> dict[str, RecallTable]:
    """A table for each split: rows are scores of each group, columns the recalls both ways."""
    # Split -> score -> column -> a cell for each group.
    splits: dict[str, dict[str, dict[str, list[Cell]]]] = {}
    for name, cells in results.items():
        recall = RECALL.fullmatch(name)
        if recall:
            split, score, column = recall.groups()
            splits.setdefault(split, {}).setdefault(score, {})[column] = cells
    return {split: _table(scores, names) for split, scores in splits.items()}


def _table(scores: Mapping[str, Mapping[str, list[Cell]]], names: Sequence[str]) -> RecallTable:
    every: dict[str, None] = {}
    for values in scores.values():
        every |= dict.fromkeys(values)
    columns = sorted(every, key=_column_order)
    rows: dict[str, list[Cell]] = {}
    chance: dict[str, list[Cell]] = {}
    for score, values in scores.items():
        part = chance if score == CHANCE else rows
        for g, name in enumerate(names):
            cells = [values[column][g] if column in values else Cell() for column in columns]
            part[score if len(names) == 1 else f"{score}: {name}"] = cells
    for cells_of_column in zip(*rows.values(), strict=True):
        mark_best(cells_of_column)
    heads: dict[str, list[str]] = {}
    for column in columns:
        way, _, k = column.partition("_r")
        if way in WAYS:
            heads.setdefault(WAYS[way], []).append(f"R@{k}")
        else:
            heads.setdefault("", []).append("mean recall")
    return RecallTable(heads, {**rows, **chance})


def mark_best(cells: Sequence[Cell]) -> None:
    """Mark the cells with the highest value, all that print it alike, unless only one has one.

    None is the best of values that were measured on different pairs.
    """
    known = [cell for cell in cells if cell.value is not None]
    if len(known) > 1 and len({cell.pairs for cell in known}) == 1:
        most = max(map(_printed, known))
        for cell in known:
            cell.best = _printed(cell) == most


def _printed(cell: Cell) -> float:
    assert cell.value is not None
    return round(cell.value, 3)


def others(results: Mapping[str, list[Cell]]) -> dict[str, list[Cell]]:
    """The metrics that are no recalls, with the best group of an accuracy marked."""
    rows = {name: cells for name, cells in results.items() if not RECALL.fullmatch(name)}
    for name, cells in rows.items():
        if ACCURACY.fullmatch(name):
            mark_best(cells)
    return rows


def headline(results: Mapping[str, list[Cell]], split: str) -> str:
    """A split's result in one line: R@1 both ways by its first score, and chance."""

    def value(name: str) -> str:
        cells = results.get(f"{split}/{name}")
        return cells[0].text if cells else ""

    scores = []
    for name in results:
        match = RECALL.fullmatch(name)
        if match and match[1] == split:
            scores.append(match[2])
    score = next((name for name in ("combined", "cmli", "global") if name in scores), scores[0])
    parts = []
    for way, said in WAYS.items():
        recall = value(f"{score}/{way}_r1")
        if recall:
            parts.append(f"{recall} {said}")
    text = f"mean recall {value(f'{score}/mean_recall')} ({score})"
    if parts:
        text = f"R@1 {', '.join(parts)} ({score})"
    if value("pairs"):
        text += f"; {value('pairs')} pairs"
    if value("chance/i2t_r1"):
        text += f"; chance {value('chance/i2t_r1')}"
    return text


def _column_order(column: str) -> tuple[bool, str, int]:
    way, _, k = column.partition("_r")
    return column == "mean_recall", way, int(k) if k.isdigit() else 0
