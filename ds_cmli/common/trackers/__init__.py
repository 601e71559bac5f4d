"""Where a run's numbers and pictures go beside `metrics.jsonl`, by name. A new tracker is one file here and one line.

The table is read before the libraries are needed, so an entry names its class and `load` imports it.
"""

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from ds_cmli.common.errors import UserError


@dataclass(frozen=True)
class Entry:
    implementation: str  # "file.Class", a `Tracker`
    library: str  # the module that it needs, which pip installs by the same name


TRACKERS = {
    "tensorboard": Entry("tensorboard.TensorBoard", "tensorboard"),
    "wandb": Entry("weights_and_biases.WeightsAndBiases", "wandb"),
    "mlflow": Entry("mlflow_tracking.MLflow", "mlflow"),
}


MATCH_MAPS = "match-maps/"  # begins the name of each picture of a match map


class Tracker(Protocol):
    """Opened on rank 0 alone, with the run's folder, which holds its `config.json`, and the step it goes on from.

    A user's mistake in opening it is a `UserError`. What it raises later is told once, and the run goes on.
    """

    errors: tuple[type[Exception], ...]  # what writing may raise that is no mistake of this package

    def numbers(self, step: int, values: dict[str, float]) -> None: ...

    def picture(self, step: int, name: str, image: Any) -> None:
        """`image`: a NumPy array, uint8 [height, width, 3]."""

    def close(self) -> None: ...


def check(names: Sequence[str]) -> None:
    """Raise `UserError` where a tracker's library is not installed, without importing it."""
    for name in names:
        library = TRACKERS[name].library
        if importlib.util.find_spec(library) is None:
            raise UserError(f"run.report_to has {name!r}, which is not installed: pip install {library}")


def load(name: str, folder: Path, first_step: int) -> Tracker:
    """The tracker `name`, opened. Raises `UserError`."""
    module, _, cls = TRACKERS[name].implementation.partition(".")
    return getattr(import_module(f"{__name__}.{module}"), cls)(folder, first_step)


def kept_id(folder: Path, new: str) -> str:
    """The name of a run in a tracker: the one that `folder/run-id` holds, or else `new`, which is written there."""
    file = folder / "run-id"
    if file.is_file():
        return file.read_text().strip()
    folder.mkdir(exist_ok=True)
    file.write_text(new)
    return new
