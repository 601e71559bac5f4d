"""The tables of results: retrieval as papers print it, and every other held-out metric; the best of
each in bold.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ds_cmli.report.runs import RunFiles, mean

RECALL = re.compile(
    r"(.+)/([^/]+)/((?:i2t|t2i)_r\d+|mean_recall)"
)  # split, score and metric of a column
WAYS = {"i2t": "image to text", "t2i": "text to image"}
CHANCE = "chance"
ACCURACY = re.compile(
    r"(?!.*chance).*pointing_game"
)  # of metrics that are no recalls: more is better


@dataclass(frozen=True)
class Cell:
    text: str = ""
    value: float | None = None
    best: bool = False

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class Table:
    heads: dict[str, list[str]]  # way -> its columns
    rows: dict[str, list[Cell]]


def last_values(grouped: Sequence[Sequence[RunFiles]]) -> dict[str, list[Cell]]:
    """The last value of each held-out metric, a cell for each group of runs: their mean and its
    standard error.
    """
    last = [[run.last("eval/") for run in group] for group in grouped]
    columns = dict.fromkeys(name for group in last for run in group for name in run)
    out: dict[str, list[Cell]] = {}
    for name in columns:
        cells = [_cell(name, [run[name] for run in group if name in run]) for group in last]
        out[name.removeprefix("eval/")] = cells
    return out


def _cell(name: str, values: Sequence[Any]) -> Cell:
    numbers = [value for value in values if isinstance(value, int | float)]
    share = RECALL.fullmatch(name) or any(isinstance(number, float) for number in numbers)
    if numbers and (share or len(set(numbers)) > 1):
        found = mean(numbers)
        return Cell(str(found), found.value)
    shown = values[0] if values else ""
    return Cell(", ".join(map(str, shown)) if isinstance(shown, list) else str(shown))


def retrieval(results: Mapping[str, list[Cell]], names: Sequence[str]) -> dict[str, Table]:
    """A table for each split: rows are scores of each group, columns the recalls both ways. The
    best are marked.
    """
    splits: dict[
        str, dict[str, dict[str, list[Cell]]]
    ] = {}  # split -> score -> column -> a cell for each group
    for name, cells in results.items():
        found = RECALL.fullmatch(name)
        if found:
            split, score, column = found.groups()
            splits.setdefault(split, {}).setdefault(score, {})[column] = cells
    return {split: _table(scores, names) for split, scores in splits.items()}


def _table(scores: Mapping[str, Mapping[str, list[Cell]]], names: Sequence[str]) -> Table:
    every = dict.fromkeys(column for score in scores.values() for column in score)
    columns = sorted(every, key=_column_order)
    rows: dict[str, list[Cell]] = {}
    chance: dict[str, list[Cell]] = {}
    for score, values in scores.items():
        for g, name in enumerate(names):
            label = score if len(names) == 1 else f"{score}: {name}"
            cells = [values[column][g] if column in values else Cell() for column in columns]
            (chance if score == CHANCE else rows)[label] = cells
    marked = [best(column) for column in zip(*rows.values(), strict=True)]
    rows = {label: [column[r] for column in marked] for r, label in enumerate(rows)}
    heads: dict[str, list[str]] = {}
    for column in columns:
        way, _, k = column.partition("_r")
        heads.setdefault(WAYS.get(way, ""), []).append(f"R@{k}" if way in WAYS else "mean recall")
    return Table(heads, {**rows, **chance})


def best(cells: Sequence[Cell]) -> list[Cell]:
    """The cells with the highest value marked, all that print it alike; none where only one has a
    value.
    """
    values = [round(cell.value, 3) for cell in cells if cell.value is not None]
    if len(values) < 2:
        return list(cells)
    return [
        replace(c, best=c.value is not None and round(c.value, 3) == max(values)) for c in cells
    ]


def others(results: Mapping[str, list[Cell]]) -> dict[str, list[Cell]]:
    """The metrics that are no recalls, a row for each, with the best group of an accuracy marked."""
    rows = {name: cells for name, cells in results.items() if not RECALL.fullmatch(name)}
    return {
        name: best(cells) if ACCURACY.fullmatch(name) else cells for name, cells in rows.items()
    }


def headline(results: Mapping[str, list[Cell]], split: str) -> str:
    """A split's result in one line: R@1 both ways by its first score, chance, and the number of
    pairs.
    """

    def value(name: str) -> str:
        return next((cell.text for cell in results.get(f"{split}/{name}", [])), "")

    scores = [
        found[2] for name in results if (found := RECALL.fullmatch(name)) and found[1] == split
    ]
    score = next((name for name in ("combined", "cmli", "global") if name in scores), scores[0])
    parts = [
        f"{value(f'{score}/{way}_r1')} {said}"
        for way, said in WAYS.items()
        if value(f"{score}/{way}_r1")
    ]
    text = (
        f"R@1 {', '.join(parts)} ({score})"
        if parts
        else f"mean recall {value(f'{score}/mean_recall')} ({score})"
    )
    notes = [
        f"{value('pairs')} pairs" if value("pairs") else "",
        f"chance {value('chance/i2t_r1')}",
    ]
    return "; ".join([text, *(note for note in notes if note and not note.endswith(" "))])


def _column_order(column: str) -> tuple[bool, str, int]:
    way, _, k = column.partition("_r")
    return column == "mean_recall", way, int(k) if k.isdigit() else 0
