"""Writes a student that began as a model of another library as one of that library again.

The tokens' maps into the joint space, which the library's model has no place for, are a file of
their own.
"""

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from ds_cmli.common.errors import UserError
from ds_cmli.config.registry import of_dual
from ds_cmli.config.schema import Config
from ds_cmli.export.folder import Trained

TOKENS = "token_maps.safetensors"


def check(config: Config, kind: str) -> None:
    """Raise `UserError` unless the student of a run is a model of that kind."""
    own = config.student.source_config.get("model_type", "two encoders")
    if own not in (kind, f"{kind}2"):  # SigLIP 2's too
        raise UserError(f"--as is {kind!r}, and the run's student began as {own}")
    if config.student.shared_blocks:
        raise UserError(
            f"--as is {kind!r}: its models have no shared blocks, and the student has "
            f"{config.student.shared_blocks}"
        )


def write(folder: Path, trained: Trained, kind: str) -> list[str]:
    """Write the folder of a model that its library loads as any other.

    Returns:
        Lines for the user about what was written.

    Raises:
        UserError: as `check`.
    """
    check(trained.config, kind)
    own = trained.config.student.source_config
    lines: list[str] = of_dual("export", own).write(folder, trained)
    maps: dict[str, torch.Tensor] = {}
    for side in ("image", "text"):
        tower: nn.Module = getattr(trained.objective.student, side)
        for name, value in tower.token_head.state_dict().items():  # type: ignore[union-attr]
            maps[f"{side}.{name}"] = value.contiguous()
    save_file(maps, folder / TOKENS)
    loss = of_dual("config", own).loss_of(own)
    lines.append(
        f"{TOKENS}: the maps of patches and tokens into the joint space, which the library does "
        "not read"
    )
    if loss not in trained.objective.losses:
        lines.append(f"no loss {loss} was trained: temperature and bias are those of a new model")
    return lines
