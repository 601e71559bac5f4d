"""Weights & Biases, configured by its own environment variables.

Among them are WANDB_MODE, WANDB_PROJECT and WANDB_ENTITY.
"""

import json
import os
import uuid
from pathlib import Path

import wandb
from numpy import ndarray

from ds_cmli import trackers
from ds_cmli.common.errors import UserError, one_line


class WeightsAndBiases:
    """A resumed run continues the same wandb run, whose id `wandb/run-id` in its folder keeps."""

    errors = (Exception,)

    def __init__(self, folder: Path, first_step: int):
        try:
            name = trackers.kept_id(folder / "wandb", uuid.uuid4().hex[:12])
            self.run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", "ds-cmli"),
                name=folder.resolve().name,
                id=name,
                resume="allow",
                dir=str(folder),
                config=json.loads((folder / "config.json").read_text()),
                settings=wandb.Settings(silent=True, console="off"),
            )
            # A resumed run may repeat steps, which wandb's own step counter would refuse.
            self.run.define_metric("step")
            self.run.define_metric("*", step_metric="step")
        except (OSError, wandb.Error) as error:
            raise UserError(
                f"run.report_to has 'wandb', which cannot be opened: {one_line(error)}: "
                "see `wandb login`, or WANDB_MODE=offline"
            ) from None

    def numbers(self, step: int, values: dict[str, float]) -> None:
        self.run.log({"step": step, **values})

    def picture(self, step: int, name: str, image: ndarray) -> None:
        self.run.log({"step": step, name: wandb.Image(image)})

    def close(self) -> None:
        self.run.finish()
