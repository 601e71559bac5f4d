"""Trackers get a run's numbers and pictures, in addition to `metrics.jsonl`.

`config/registry.py` lists them. The names of a run's scalars, its configuration, and a table of its
settings and results are the same in all.
"""

import json
from contextlib import suppress
from pathlib import Path
from typing import Protocol, runtime_checkable

from numpy import ndarray

from ds_cmli.common.json_text import read

MATCH_MAPS = "match-maps/"  # the first part of the name of each match map's picture
Scalar = bool | int | float | str
SPEED = ("pairs_per_s", "tflops", "mfu", "checkpoint_s")
RESULTS = ("retrieval/", "pointing-game/")  # groups of held-out metrics
OPTIMIZER = (
    "lr",
    "grad_norm",
    "loss_scale",
    "skipped_steps",
    "ignored_negatives",
    "added_positives",
)


@runtime_checkable
class Tracker(Protocol):
    """A tracker of `run.report_to` is opened on rank 0 only, with (folder, first step).

    The folder is the run's, which holds `config.json`; the run goes on from the first step.
    Opening raises `UserError` for a user's mistake. Of the errors that a tracker raises later only
    the first is reported, and the run goes on. A callback of `ds_cmli.fit` is one that is open.
    """

    errors: tuple[type[Exception], ...] = ()  # errors of writing, which do not end the run

    def numbers(self, step: int, values: dict[str, float]) -> None:
        """The values of a logged step, or of an evaluation, by the names that `tag` gives."""

    def picture(self, step: int, name: str, image: ndarray) -> None:
        """`image`: a NumPy array, uint8 [height, width, 3]."""

    def close(self) -> None:
        """The run has ended."""


def kept_id(folder: Path, new: str) -> str:
    """Return a run's id in a tracker, from `folder/run-id`, or else write `new` to that file."""
    file = folder / "run-id"
    if file.is_file():
        return file.read_text().strip()
    folder.mkdir(exist_ok=True)
    file.write_text(new)
    return new


def tag(name: str) -> str:
    """Name a column of metrics.jsonl for a tracker. The part before "/" is its group there."""
    group, _, rest = name.partition("/")
    if group == "eval":
        split, _, metric = rest.partition("/")
        if "pointing" in metric:
            return f"pointing-game/{split}"
        return f"retrieval/{split}/{metric}"
    if name == "loss":
        return "loss/total"
    if name in SPEED or group == "time":
        return f"speed/{name}"
    if "memory" in name:
        return f"memory/{name}"
    return f"optimizer/{name}" if name in OPTIMIZER else name


def configuration(folder: Path) -> str:
    """The run's `config.json` and, if there is one, its `memory.json`, as Markdown."""
    parts = []
    for name in ("config.json", "memory.json"):
        with suppress(OSError, ValueError):  # memory.json may be missing, or an earlier start's
            text = json.dumps(read(folder / name, dict), indent=2)
            parts.append(f"## {name}\n\n" + "\n".join(f"    {line}" for line in text.splitlines()))
    return "\n\n".join(parts)


def settings(folder: Path) -> dict[str, Scalar]:
    """The run's settings that are a number, string or boolean, its losses and its ZeRO stage."""
    content = read(folder / "config.json", dict)
    sections = content["config"]
    out: dict[str, Scalar] = {
        f"{section}.{name}": value
        for section, values in sections.items()
        for name, value in values.items()
        if isinstance(value, bool | int | float | str)
    }
    out["losses"] = ",".join(sections["loss"]["weights"])
    out["ZeRO stage"] = content.get("deepspeed", {}).get("zero_optimization", {}).get("stage", 0)
    return out
