"""Trackers get a run's numbers and pictures, in addition to `metrics.jsonl`.

`config/registry.py` lists them.
"""

from pathlib import Path
from typing import Protocol

from numpy import ndarray

from ds_cmli.config import registry

MATCH_MAPS = "match-maps/"  # the first part of the name of each match map's picture


class Tracker(Protocol):
    """A tracker is opened on rank 0 only, with (folder, first step).

    The folder is the run's, which holds `config.json`; the run goes on from the first step.
    Opening raises `UserError` for a user's mistake. Of the errors that a tracker raises later only
    the first is reported, and the run goes on.
    """

    errors: tuple[type[Exception], ...]  # errors of writing, which do not end the run

    def numbers(self, step: int, values: dict[str, float]) -> None: ...

    def picture(self, step: int, name: str, image: ndarray) -> None:
        """`image`: a NumPy array, uint8 [height, width, 3]."""

    def close(self) -> None: ...


def open_tracker(name: str, folder: Path, first_step: int) -> Tracker:
    """Open the tracker `name`. Raises `UserError`."""
    return registry.load(registry.TRACKERS[name])(folder, first_step)


def kept_id(folder: Path, new: str) -> str:
    """Return a run's id in a tracker, from `folder/run-id`, or else write `new` to that file."""
    file = folder / "run-id"
    if file.is_file():
        return file.read_text().strip()
    folder.mkdir(exist_ok=True)
    file.write_text(new)
    return new
