"""The base class of losses."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from ds_cmli.cmli.contrastive import MAX_SCALE
from ds_cmli.config.schema import LossConfig
from ds_cmli.losses.inputs import LossInputs, PairInputs
from ds_cmli.models.dual import Start

__all__ = ["Loss", "LossInputs", "PairInputs", "log_scale"]  # what a loss needs


class Loss(nn.Module):
    """One loss with its own parameters.

    Each file of this folder defines one, and the table in `config/registry.py` names it.

    A loss with a temperature keeps it as the parameter `logit_scale`, ln(1/temperature), which
    `log_scale` makes; it is logged as `temperature/<name>`.
    """

    logit_scale: nn.Parameter  # only in a loss with a temperature
    max_scale = MAX_SCALE  # the maximum of 1/temperature
    sums = True  # whether it uses `row_logsumexp` or `column_logsumexp` of its inputs

    def __init__(self, config: LossConfig):
        super().__init__()
        self.config = config

    def start_from(self, start: Start) -> None:
        """Begin as the source of the student was trained, if this is its loss."""

    def forward(self, inputs: Any) -> Tensor:
        """The mean loss over the pairs of `inputs`, a scalar in fp32 (fp64).

        Its mean over ranks is the global batch's. `inputs` is `LossInputs`, or any `PairInputs` for
        a loss that compares pairs, as its table entry says.
        """
        raise NotImplementedError


def log_scale(temperature: float) -> nn.Parameter:
    """The learned parameter ln(1/temperature), shape [1]."""
    # Not 0-dimensional: DeepSpeed sends parameters as bytes, and a 0-dimensional tensor cannot be
    # viewed as bytes.
    return nn.Parameter(torch.tensor([math.log(1 / temperature)]))
