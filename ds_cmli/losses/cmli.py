"""All-pairs CMLI as a contrastive loss.

Equations (1) to (4) of the source document, FILIP (Yao et al., 2021).
"""

from torch import Tensor

from ds_cmli.cmli.contrastive import contrastive_loss
from ds_cmli.config.schema import LossConfig
from ds_cmli.losses.base import Loss, PairInputs, log_scale


class AllPairsCMLI(Loss):
    def __init__(self, config: LossConfig):
        super().__init__(config)
        self.logit_scale = log_scale(config.cmli_init_temperature)

    def forward(self, inputs: PairInputs) -> Tensor:
        s_i2t, s_t2i = inputs.cmli_scores  # [R, T], collective
        ignore = inputs.duplicates  # collective
        logsumexps = inputs.row_logsumexp, inputs.column_logsumexp
        loss = contrastive_loss(
            s_i2t, s_t2i, self.logit_scale, inputs.first, *logsumexps, ignore
        )  # collective
        return inputs.with_units(loss, self.logit_scale)
