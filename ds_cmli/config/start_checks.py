"""Checks of what is outside of a run at its start: files outside its folder, and wandb.

DeepSpeed opens those files when training has begun, and ends the run if it cannot.
"""

import importlib.util
import os
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from ds_cmli.common.errors import UserError
from ds_cmli.common.json_text import Section
from ds_cmli.config.validation import shown

# Sections of the JSON whose `output_path` is a folder, in which `job_name` is another one.
FOLDERS = ("tensorboard", "csv_monitor")


def check_wandb(report_to: str) -> None:
    """Raise `UserError` if wandb is wanted and not installed. Nothing is imported."""
    if report_to == "wandb" and importlib.util.find_spec("wandb") is None:
        raise UserError("run.report_to is 'wandb', which is not installed: pip install wandb")


def check_restarts(output_dir: str, resume: str) -> None:
    """Raise `UserError` if a start by torchrun's --max-restarts would not go on from the last."""
    most = os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")
    if most != "0" and (not output_dir or resume != "auto"):
        raise UserError(
            f"torchrun's --max-restarts is {most}, --output-dir {output_dir!r} and --resume "
            f"{resume!r}: give a folder, from which each start goes on, and leave out --resume"
        )


def check_outputs(ds_config: Section, report_to: str) -> None:
    """Raise `UserError` for the first place that cannot be written. For rank 0, which writes."""
    for setting, value, place in _places(ds_config):
        try:
            _try(place, folder=not setting.endswith("output_file"))
        except (OSError, ValueError) as error:  # ValueError: the path holds a NUL
            why = getattr(error, "strerror", None) or error
            raise UserError(
                f"{setting} is {shown(value)}: cannot write there: {why}: give another path"
            ) from None
    by_json = ds_config.get("wandb", {}).get("enabled")
    if (by_json or report_to == "wandb") and not _logged_in():
        setting = "wandb.enabled is true" if by_json else "run.report_to is 'wandb'"
        raise UserError(
            f"{setting} and wandb has no login: `wandb login`, WANDB_API_KEY or WANDB_MODE=offline"
        )


def _places(ds_config: Section) -> Iterator[tuple[str, str, Path]]:
    """(setting, its value, what is written) for each."""
    profiler = ds_config.get("flops_profiler", {})
    if profiler.get("enabled") and profiler.get("output_file"):
        yield "flops_profiler.output_file", profiler["output_file"], Path(profiler["output_file"])
    for name in FOLDERS:
        section = ds_config.get(name, {})
        if section.get("enabled"):
            path = section.get("output_path", "")
            place = Path(path) / section.get("job_name", "DeepSpeedJobName")
            yield f"{name}.output_path", path, place


def _try(place: Path, folder: bool) -> None:
    """Make the file, or one in the folder, and remove what is new; may raise any error of it."""
    made = [path for path in (place, *place.parents) if not path.exists()]
    try:
        (place if folder else place.parent).mkdir(parents=True, exist_ok=True)
        if folder:
            tempfile.TemporaryFile(dir=place).close()
        else:
            place.open("a").close()
    finally:
        with suppress(OSError):  # another run of the same job may be using the folder by now
            for path in made:
                if path.is_dir():
                    path.rmdir()
                elif path.exists():
                    path.unlink()


def _logged_in() -> bool:
    if os.environ.get("WANDB_MODE", "online") not in ("online", "run", "shared"):
        return True
    import wandb

    return bool(wandb.login(prompt=False))
