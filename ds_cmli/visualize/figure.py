"""Draws a match map as a picture for a paper or a slide, with a block for each model."""

from pathlib import Path
from typing import Any

from PIL import Image

from ds_cmli.common.errors import UserError
from ds_cmli.common.match_sheet import sheet


def write_figure(panel: Any, path: str | Path) -> None:
    """Draw a `Panel`. Raises `UserError` if the file cannot be written."""
    names = {name if len(panel.matches) > 1 else "": match for name, match in panel.matches.items()}
    try:
        Image.fromarray(sheet(panel.image, panel.text, names)).save(path, optimize=True)
    except (OSError, ValueError) as error:
        raise UserError(f"the picture is {str(path)!r}: cannot write it: {error}") from None
