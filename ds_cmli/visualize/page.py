"""Writes match maps as one HTML page that needs no network. Hovering a word shows its patches, and
vice versa.

Shapes: S image side in pixels, N image patches, M words.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from ds_cmli.common import documents
from ds_cmli.common.plots import COLOURS
from ds_cmli.inference.model import Match


@dataclass
class Panel:
    """One caption and its picture, with the matches of one or several models."""

    title: str
    text: str
    image: Tensor  # uint8 [3, S, S]
    matches: dict[str, Match]  # model's name -> its match; all have the same words


def write_page(panels: Sequence[Panel], path: str | Path, title: str = "Match maps") -> None:
    """Write the page; raises `UserError` if the file cannot be written."""
    shown = [_values(panel) for panel in panels]
    documents.write_page(
        path,
        "the page",
        "ds_cmli.visualize",
        "maps.html.jinja",
        title=title,
        panels=shown,
        colours=COLOURS,
    )


def _values(panel: Panel) -> dict[str, Any]:
    first = next(iter(panel.matches.values()))
    return {
        "title": panel.title,
        "pieces": pieces(panel.text, first.spans),
        "image": _data_url(panel.image),
        "models": [
            {
                "name": name,
                "rows": match.grid[0],
                "columns": match.grid[1],
                "similarity": [
                    [round(value, 3) for value in row] for row in match.similarity.tolist()
                ],
            }
            for name, match in panel.matches.items()
        ],
    }


def pieces(text: str, spans: Sequence[tuple[int, int]]) -> list[tuple[str, int | None]]:
    """The text in pieces: each word with its number, and the text between words with None."""
    out: list[tuple[str, int | None]] = []
    position = 0
    for number, (start, end) in enumerate(spans):
        if start > position:
            out.append((text[position:start], None))
        out.append((text[start:end], number))
        position = max(position, end)
    if text[position:]:
        out.append((text[position:], None))
    return out


def _data_url(image: Tensor) -> str:
    """uint8 [3, S, S] -> a PNG as a data URL."""
    buffer = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(buffer, "PNG")
    return documents.data_url(buffer.getvalue(), "png")
