"""The checkpoints in a run's folder, and the newest whole one."""

import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from ds_cmli.checkpoint import files
from ds_cmli.checkpoint.train_state import TrainState, read_shared
from ds_cmli.checkpoint.write import WRITING
from ds_cmli.common.errors import UserError
from ds_cmli.distributed import process_group as distributed

FOLDER = "checkpoint"
LATEST = "latest"  # DeepSpeed's name, so that its tools find the newest checkpoint too


def step_of(name: str) -> int:
    """The step of a checkpoint, from its name."""
    return int(name.removeprefix("step").partition(".")[0])


def names(root: Path) -> list[str]:
    """The checkpoints in `root`, oldest first."""
    numbered = []
    for path in root.iterdir() if root.is_dir() else ():
        match = re.fullmatch(r"step(\d+)(?:\.(\d+))?", path.name)
        if match and path.is_dir():
            numbered.append((int(match[1]), int(match[2] or 0), path.name))
    return [name for *_, name in sorted(numbered)]


def latest(root: Path) -> str | None:
    """The checkpoint that `latest` names; None if none is published, or the file cannot be read."""
    try:
        name = (root / LATEST).read_text().strip()
    except (OSError, UnicodeDecodeError):
        return None
    return name if name in names(root) else None


def candidates(root: Path) -> list[str]:
    """The checkpoints to try: that of `latest` and older ones, newest first; or all."""
    known, newest = names(root), latest(root)
    if newest is not None:
        known = known[: known.index(newest) + 1]
    return known[::-1]


def remove_incomplete(folder: Path) -> None:
    """Remove what a save that was interrupted has left in the run's folder."""
    for path in (*folder.glob("*" + WRITING), *(folder / FOLDER).glob("*" + WRITING)):
        remove(path)


def remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@dataclass
class ResumePoint:
    """A verified checkpoint to resume from."""

    path: Path
    state: TrainState
    ranks: int  # number of ranks that wrote it
    lines: list[str]  # messages to the user about damaged checkpoints that were skipped
    # Whether this start partitions weights and optimizer states differently than the checkpoint.
    resharded: bool = False
    changed: bool = False  # whether this start has other settings, by --resume-with-changes

    def is_of(self, folder: Path) -> bool:
        """Whether it is a checkpoint of the run in `folder`."""
        return folder.resolve() in self.path.resolve().parents

    @property
    def same_ranks(self) -> bool:
        return self.ranks == distributed.world_size()

    @property
    def batch_as_asked(self) -> bool:
        """Whether the batch is split over ranks as this start's settings say."""
        return self.same_ranks and not self.state.rebatched


def find(resume: str, folder: Path) -> ResumePoint | None:
    """The newest undamaged checkpoint, given `--resume` and the run's folder. Collective.

    Returns:
        None for a fresh start.

    Raises:
        UserError: on every rank, if the path has no checkpoint, or all of them are damaged.
    """
    choice = _candidates(resume, folder) if distributed.is_main() else None
    paths, error = distributed.broadcast_object(choice)  # collective
    if error is not None:
        raise UserError(error)
    lines: list[str] = []
    for path in paths:
        damage = problem(path)  # collective
        if damage is None:
            state = read_shared(path)
            return ResumePoint(path, state, state.world_size, lines)
        lines.append(f"checkpoint {path} is damaged: {damage}; trying the one before")
    if lines:
        raise UserError(
            f"{lines[-1].rsplit(';', 1)[0]}; there is no other to go on from: give another "
            "--output-dir to start over"
        )
    return None


def problem(path: Path) -> str | None:
    """What is wrong with a checkpoint; None if nothing is. Collective.

    The ranks share this work: reading all files takes as long as loading them.
    """
    mine = files.problem(path, distributed.rank(), distributed.world_size())
    return next(filter(None, distributed.gather_objects(mine)), None)  # collective


def _candidates(resume: str, folder: Path) -> tuple[list[Path], str | None]:
    """The checkpoints in the order in which to try them, and what is wrong with `--resume`."""
    of_run = folder / FOLDER
    known = _paths(of_run)
    if resume == "never":
        if not known:
            return [], None
        return [], f"--resume is 'never', and {folder} has a run: give another --output-dir"
    if resume == "auto":
        return known, None
    path = Path(resume).absolute()
    if path.is_dir() and path.name in names(path.parent):
        root, paths = path.parent, [path]
    else:
        root = path if path.name == FOLDER else path / FOLDER
        paths = _paths(root)
    if known and root != of_run.absolute():
        # This run was started from another run's checkpoint before, and has its own by now.
        return known, None
    if not paths:
        return [], f"--resume is {resume!r}: no checkpoint there; give a run's output folder"
    return paths, None


def _paths(root: Path) -> list[Path]:
    return list(map(root.joinpath, candidates(root)))
