"""A run's folder: made once, held by one run, and set back to the step that a run goes on from."""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from ds_cmli.checkpoint import save
from ds_cmli.checkpoint.lock import written_together
from ds_cmli.checkpoint.resume import ResumePoint, root_of
from ds_cmli.checkpoint.save import FOLDER
from ds_cmli.checkpoint.state import TrainState
from ds_cmli.commands import print_line
from ds_cmli.config.deepspeed_config import DeepSpeedConfig
from ds_cmli.config.schema import Config
from ds_cmli.distributed import process_group as distributed
from ds_cmli.files import sha256
from ds_cmli.models.hf import BEST
from ds_cmli.provenance import revision, versions

METRICS = "metrics.jsonl"
CONFIG = "run.json"


@contextmanager
def made(config: Config, resume: str) -> Iterator[Path]:
    """The run's folder; a new one is removed at the end if it is empty. Collective."""
    named = config.run.output_dir
    if not named and resume not in ("auto", "never"):  # that of the run in `--resume PATH`
        named = str(root_of(resume).parent)
    base = folder = Path(named or f"runs/{config.run.preset}-{datetime.now():%Y%m%d-%H%M%S}")
    new = list[Path]()
    with written_together(base):  # collective
        if distributed.is_main():
            number = 1
            while not named and folder.exists():  # of another start in this second
                number += 1
                folder = base.with_name(f"{base.name}.{number}")
            new += [path for path in (folder, *folder.parents) if not path.exists()]
            folder.mkdir(parents=True, exist_ok=True)
    try:
        yield distributed.broadcast_object(folder)  # collective
    finally:
        with suppress(OSError):
            for path in new:
                path.rmdir()


def settle(
    point: ResumePoint | None,
    folder: Path,
    config: Config,
    ds_config: DeepSpeedConfig,
    describe: Callable[[Path], None],
) -> None:
    """Remove the records of steps after that at which the run goes on. Collective.

    `describe` writes what a model's folder has beside its weights.
    """
    with written_together(folder):  # collective
        if not distributed.is_main():
            return
        save.remove_incomplete(folder)
        state = TrainState() if point is None else point.state
        if point is not None and point.is_of(folder):
            save.publish(folder / FOLDER / save.LATEST, point.path.name.encode())
        _cut_back(folder / METRICS, state.step, state.evaluated)
        kept = folder / BEST
        if kept.is_file() and sha256(kept) != state.best.get("sha256"):
            print_line(f"{kept} is not the best of this run: removed")
            kept.unlink()
        describe(folder)
        content: dict[str, Any] = {"config": config.to_dict(), "deepspeed": dict(ds_config)}
        content |= {"versions": versions(), "revision": revision(), "command": sys.argv}
        save.publish(folder / CONFIG, (json.dumps(content, indent=2) + "\n").encode())


def _cut_back(path: Path, step: int, evaluated: bool) -> None:
    """Keep the lines up to `step`; without that step's evaluation if it is still to be done."""
    kept = []
    for line in path.read_bytes().splitlines(keepends=True) if path.is_file() else ():
        with suppress(ValueError, KeyError, TypeError):  # a line that was cut off
            values = json.loads(line)
            again = not evaluated and any(name.startswith("eval/") for name in values)
            if values["step"] < step + (not again) and line.endswith(b"\n"):
                kept.append(line)
    save.publish(path, b"".join(kept))
