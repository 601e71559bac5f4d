"""Sigmoid loss on the class tokens, as in SigLIP (Zhai et al., 2023, algorithm 1)."""

import torch
from torch import Tensor, nn

from ds_cmli.config.schema import LossConfig
from ds_cmli.losses.base import Loss, PairInputs, log_scale
from ds_cmli.losses.functions import sigmoid_loss


class GlobalSigmoid(Loss):
    # SigLIP's initial values: a scale of 10, and a bias with which the many negatives start with a
    # small loss.
    init_temperature, init_bias = 0.1, -10.0

    def __init__(self, config: LossConfig):
        super().__init__(config)
        self.logit_scale = log_scale(self.init_temperature)
        self.logit_bias = nn.Parameter(torch.tensor([self.init_bias]))

    def forward(self, inputs: PairInputs) -> Tensor:
        scores, positives = inputs.global_scores, inputs.duplicates  # [B, G] each, collective
        return sigmoid_loss(scores, self.logit_scale, self.logit_bias, inputs.first, positives)
