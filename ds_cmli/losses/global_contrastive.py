"""Global contrastive loss on the class tokens, as in CLIP (Radford et al., 2021)."""

from torch import Tensor

from ds_cmli.cmli.contrastive import contrastive_loss
from ds_cmli.config.schema import LossConfig
from ds_cmli.losses.base import Loss, PairInputs, log_scale


class GlobalContrastive(Loss):
    def __init__(self, config: LossConfig):
        super().__init__(config)
        self.logit_scale = log_scale(config.init_temperature)

    def forward(self, inputs: PairInputs) -> Tensor:
        scores = inputs.global_scores  # [R, T], collective
        ignore = inputs.duplicates  # collective
        logsumexps = inputs.row_logsumexp, inputs.column_logsumexp
        return contrastive_loss(
            scores, scores, self.logit_scale, inputs.first, *logsumexps, ignore
        )  # collective
