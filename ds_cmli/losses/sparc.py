"""SPARC's fine-grained loss: each token against the patches that it groups (Bica et al., 2024)."""

from torch import Tensor

from ds_cmli.config.schema import LossConfig
from ds_cmli.losses.base import Loss, log_scale
from ds_cmli.losses.functions import sparc_loss
from ds_cmli.losses.inputs import LossInputs


class Sparc(Loss):
    # The paper learns the temperature and does not say where it starts; the scores are cosines, as
    # those of the global loss, and start at its temperature.
    init_temperature = 0.07

    def __init__(self, config: LossConfig):
        super().__init__(config)
        self.logit_scale = log_scale(self.init_temperature)

    def forward(self, inputs: LossInputs) -> Tensor:
        project = inputs.student.projection
        patches = project(inputs.features.patches)  # [B, N, D]
        tokens = project(inputs.features.tokens)  # [C, M, D]
        return sparc_loss(patches, tokens, inputs.batch.token_mask, self.logit_scale)
