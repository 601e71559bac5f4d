"""The registry of trackers, which get a run's numbers and pictures in addition to `metrics.jsonl`.

A new tracker is one file in this folder and one line in the table below. The table is read without importing a
tracker's library: an entry only names its class, and `load` imports it.
"""

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ds_cmli.common import registry
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


MATCH_MAPS = "match-maps/"  # the first part of the name of each match map's picture


class Tracker(Protocol):
    """Opened on rank 0 only, with the run's folder, which holds `config.json`, and the step from which the run goes on.

    Opening raises `UserError` for a user's mistake. Of the errors that it raises later only the first is reported, and
    the run goes on.
    """

    errors: tuple[
        type[Exception], ...
    ]  # exceptions of writing that are reported and do not end the run

    def numbers(self, step: int, values: dict[str, float]) -> None: ...

    def picture(self, step: int, name: str, image: Any) -> None:
        """`image`: a NumPy array, uint8 [height, width, 3]."""

    def close(self) -> None: ...


def check(names: Sequence[str]) -> None:
    """Raise `UserError` if a tracker's library is not installed. Nothing is imported."""
    for name in names:
        library = TRACKERS[name].library
        if importlib.util.find_spec(library) is None:
            raise UserError(
                f"run.report_to has {name!r}, which is not installed: pip install {library}"
            )


def load(name: str, folder: Path, first_step: int) -> Tracker:
    """Open the tracker `name`. Raises `UserError`."""
    return registry.load(__name__, TRACKERS[name].implementation)(folder, first_step)


def kept_id(folder: Path, new: str) -> str:
    """A run's id in a tracker: the content of `folder/run-id`, or else `new`, which is then written to that file."""
    file = folder / "run-id"
    if file.is_file():
        return file.read_text().strip()
    folder.mkdir(exist_ok=True)
    file.write_text(new)
    return new
