"""The folder of a run: its name, its creation, and the records of an earlier start in it."""

import itertools
import os
import uuid
from contextlib import suppress
from datetime import datetime
from pathlib import Path

from ds_cmli.checkpoint import contents as checkpoint
from ds_cmli.checkpoint import files
from ds_cmli.checkpoint.contents import ResumePoint
from ds_cmli.checkpoint.train_state import TrainState
from ds_cmli.common import checksums, provenance
from ds_cmli.common.cli import say
from ds_cmli.common.errors import UserError
from ds_cmli.common.json_text import parse
from ds_cmli.config.deepspeed_config import DeepSpeedConfig
from ds_cmli.config.schema import Config
from ds_cmli.distributed import process_group as distributed
from ds_cmli.distributed.launchers import this_node

METRICS = "metrics.jsonl"
CHECKSUMS = METRICS + checksums.LINES
DAMAGED = "metrics.damaged.jsonl"
FORMER = "metrics.former.jsonl"  # of a run whose checkpoints are gone


def make(config: Config, resume: str) -> Path:
    """Create the run's folder. Collective."""
    name = _named(resume, config.run.output_dir)
    base = Path(name or f"runs/{config.run.preset}-{datetime.now():%Y%m%d-%H%M%S}")
    made: tuple[Path, str] | None = None
    if distributed.is_main():
        made = _make(base, named=bool(name)), f".shared-{uuid.uuid4().hex}"
    folder, mark = distributed.broadcast_object(made)  # collective
    error = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "metrics.jsonl").touch()
        if distributed.is_main():
            # As much as a run writes at first, to detect a full disk.
            (folder / mark).write_bytes(bytes(2**16))
    except OSError as caught:
        error = f"--output-dir is {str(folder)!r}: cannot write there: {caught.strerror}"
    try:
        distributed.raise_together(error)  # collective: afterwards the mark exists
        answers = distributed.gather_objects((this_node(), (folder / mark).exists()))  # collective
        nodes, seen = zip(*answers, strict=True)
    finally:
        if distributed.is_main():
            with suppress(OSError):
                (folder / mark).unlink()
    if not all(seen):
        blind = distributed.named(seen.index(False), nodes)
        raise UserError(
            f"--output-dir is {str(folder)!r}: {blind} does not see what rank 0 writes there; give "
            "a folder that all nodes share"
        )
    return folder


def _named(resume: str, output_dir: str) -> str:
    """The folder of `--output-dir`, or else of the run in `--resume PATH`, or else ""."""
    if output_dir or resume in ("auto", "never"):
        return output_dir
    path = Path(resume).absolute()
    if (path / files.CHECKSUMS).is_file():
        path = path.parent
    return str(path.parent if path.name == checkpoint.FOLDER else path)


def _make(base: Path, named: bool) -> Path:
    """Create the run's folder, which must be new unless `named`."""
    for number in itertools.count(1):
        folder = base if number == 1 else base.with_name(f"{base.name}.{number}")
        with suppress(OSError):  # the first rank that writes there reports the error
            folder.parent.mkdir(parents=True, exist_ok=True)
            try:
                folder.mkdir()
            except FileExistsError:
                if not named:
                    continue
        return folder
    raise AssertionError


def requeued(resume: str, folder: Path) -> str:
    """The value of `--resume` to use: another than the given one if Slurm has requeued this job.

    A requeued job starts with the same command line. If it has saved before, "never" or the path of
    another checkpoint have been followed already, and it must resume with "auto".
    """
    restarted = os.environ.get("SLURM_RESTART_COUNT", "0") != "0"
    if not restarted or not checkpoint.names(folder / checkpoint.FOLDER):
        return resume
    try:
        config = checksums.read(folder / "config.json")
    except OSError:
        return resume
    except ValueError:  # whose checkpoints these are is not known, and going on loses none of them
        return "auto"
    job = config.get("slurm_job")
    same_job = job is not None and job == os.environ.get("SLURM_JOB_ID")
    return "auto" if same_job else resume


def settle(
    point: ResumePoint | None, folder: Path, config: Config, ds_config: DeepSpeedConfig
) -> None:
    """Remove from the run's folder the records of steps after that at which the run continues.

    Collective.

    Raises:
        UserError: on every rank, if the folder cannot be written.
    """
    error = None
    if distributed.is_main():
        try:
            _settle(point, folder, config, ds_config)
        except OSError as caught:
            error = f"--output-dir is {str(folder)!r}: cannot write there: {caught.strerror}"
    error = distributed.broadcast_object(error)  # collective
    if error is not None:
        raise UserError(error)


def _settle(
    point: ResumePoint | None, folder: Path, config: Config, ds_config: DeepSpeedConfig
) -> None:
    root = folder / checkpoint.FOLDER
    checkpoint.remove_incomplete(folder)  # whoever had the lock before cannot publish it any more
    state, expected = TrainState(), 0
    if point is None:
        _keep_former(folder / METRICS)
    else:
        state, name = point.state, point.path.name
        if point.path.parent.absolute() == root.absolute():
            expected = state.metrics_lines
            if checkpoint.latest(root) != name:
                files.publish(root / checkpoint.LATEST, name.encode())
    for line in _truncate(folder / METRICS, state, expected):
        say(line)
    files.publish(folder / "config.json", provenance.of(config.to_dict(), ds_config))


def _keep_former(path: Path) -> None:
    """Put the lines of a run aside that cannot go on, as it has no checkpoint."""
    if path.is_file() and path.stat().st_size:
        say(
            f"{path.parent} has no checkpoint: starting over at step 1; the lines of {METRICS} are "
            f"kept in {FORMER}"
        )
        os.replace(path, path.with_name(FORMER))


def _truncate(path: Path, state: TrainState, expected: int) -> list[str]:
    """Remove the lines after the step from which a run resumes, and an incomplete last line.

    Unless `state.evaluated`, the evaluation of that step is removed too, since it will be done
    again. Damaged lines, and those that do not agree with their checksums, are moved to another
    file.

    Args:
        expected: the number of lines up to that step; 0 if not known.

    Returns:
        Lines that tell the user of damaged and of missing lines.
    """
    kept, damaged = [], []
    altered: list[str] = []  # the numbers of the lines that can be read, but are other ones
    lines = path.read_bytes().split(b"\n") if path.is_file() else [b""]
    lines.pop()  # after the last line break there is nothing, or an incomplete line
    changed = set(checksums.changed(lines, path))
    for number, text in enumerate(lines, 1):
        try:
            values = parse(text, dict)
            again = not state.evaluated and any(name.startswith("eval/") for name in values)
            stays = values["step"] <= state.step and not (again and values["step"] == state.step)
        except (ValueError, KeyError, TypeError):
            damaged.append(text + b"\n")
            continue
        if number in changed:
            damaged.append(text + b"\n")
            altered.append(str(number))
        elif stays:
            kept.append(text + b"\n")
    aside = path.with_name(DAMAGED)
    if damaged:
        with open(aside, "ab") as file:
            file.writelines(damaged)
    files.publish(path.with_name(CHECKSUMS), checksums.of_lines(b"".join(kept)))
    files.publish(path, b"".join(kept))
    warnings = []
    if len(damaged) > len(altered):
        count = len(damaged) - len(altered)
        warnings.append(f"warning: {count} lines of {path} cannot be read: kept in {aside}")
    if altered:
        warnings.append(
            f"warning: {path}: line {', '.join(altered)} does not agree with its checksum in "
            f"{CHECKSUMS}: kept in {aside}"
        )
    missing = expected - len(kept) - len(damaged)
    if missing > 0:
        warnings.append(
            f"warning: {path} has {len(kept)} of the {expected} lines up to step {state.step}: it "
            "was removed or cut off since; the run goes on without them"
        )
    return warnings
