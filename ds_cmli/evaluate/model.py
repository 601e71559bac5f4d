"""The model that is evaluated: a run, or what training may start from."""

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ds_cmli.config.schema import Config

if TYPE_CHECKING:
    from ds_cmli.data.build import EvalData
    from ds_cmli.losses.objective import Objective


def load_objective(config: Config, folder: Path, ema: bool, device: torch.device) -> "Objective":
    """Load the trained student with the temperatures of its scores, or with `ema` its average.

    No teacher is built, because evaluation does not need it. Raises `UserError`.
    """
    from ds_cmli.checkpoint.weights import load_student
    from ds_cmli.models.hf import AVERAGE, WEIGHTS

    objective = load_student(folder, config, AVERAGE if ema else WEIGHTS)
    config.loss = objective.config
    return objective.to(device)


def source_objective(config: Config, data: "EvalData", device: torch.device) -> "Objective":
    """Build the model of `student.source`, with its weights. Raises `UserError`."""
    from ds_cmli.engine import build_models

    objective, _ = build_models(config, data.vocab_size, special=data.special)
    return objective.to(device)
