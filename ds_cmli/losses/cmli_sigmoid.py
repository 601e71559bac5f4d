"""Sigmoid loss on the all-pairs CMLI scores: the mean over both directions.

SigLIP; Zhai et al. (2023).
"""

import torch
from torch import Tensor, nn

from ds_cmli.config.schema import LossConfig
from ds_cmli.losses.base import Loss, PairInputs, log_scale
from ds_cmli.losses.functions import sigmoid_loss


class CMLISigmoid(Loss):
    # A CMLI score is a mean of maxima: it varies less than a cosine and is above 0 for almost any
    # pair. A larger scale and a lower bias than SigLIP's make the negatives of an untrained student
    # start near SigLIP's logit of -10.
    init_temperature, init_bias = 0.02, -14.0

    def __init__(self, config: LossConfig):
        super().__init__(config)
        self.logit_scale = log_scale(self.init_temperature)
        self.logit_bias = nn.Parameter(torch.tensor([self.init_bias]))

    def forward(self, inputs: PairInputs) -> Tensor:
        losses = [
            sigmoid_loss(
                scores, self.logit_scale, self.logit_bias, inputs.first, inputs.duplicates
            )  # collective
            for scores in inputs.cmli_scores  # collective
        ]
        return inputs.with_units((losses[0] + losses[1]) / 2, self.logit_scale)
