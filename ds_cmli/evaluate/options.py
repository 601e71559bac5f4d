"""What the command line of `python -m ds_cmli.evaluate` asks for, and which options go together."""

import dataclasses
from dataclasses import dataclass

from ds_cmli.common.errors import UserError


@dataclass
class EvaluationOptions:
    """What the command line asks for."""

    model: str
    is_run: bool  # otherwise, what `student.source` takes
    ema: bool
    batch_size: int
    workers: int
    source: str | None
    image_root: str | None
    split: str | None
    fold_size: int | None
    zero_shot: str | None
    class_names: str | None
    templates: str | None
    boxes: str | None


def check(request: EvaluationOptions) -> None:
    """Raise `UserError` for a wrong option, one that the mode does not read, or one it lacks."""
    for name, least in (("batch_size", 1), ("workers", 0), ("fold_size", 1)):
        value = getattr(request, name)
        if value is not None and value < least:
            raise UserError(f"{option_of(name)} is {value}: give at least {least}")
    for field in dataclasses.fields(request)[5:]:
        name = field.name
        if getattr(request, name) == "":
            raise UserError(f"{option_of(name)} is empty: give a value, or leave it out")
    mode, reads = "", {"source", "image_root", "split", "fold_size"}
    if request.zero_shot:
        mode, reads = "zero_shot", {"zero_shot", "class_names", "templates"}
    elif request.boxes:
        mode, reads = "boxes", {"boxes", "image_root", "split"}
    for field in dataclasses.fields(request)[5:]:
        if field.name not in reads and getattr(request, field.name) is not None:
            where = f"with {option_of(mode)}" if mode else "without --zero-shot"
            raise UserError(f"{option_of(field.name)} has no effect {where}: leave it out")
    if request.boxes and not request.image_root:
        raise UserError("--boxes needs --image-root: give the folder of the pictures")


def option_of(name: str) -> str:
    return "--" + ("data" if name == "source" else name.replace("_", "-"))
