"""Two losses as a stranger would write them: one compares all pairs, one takes each pair for itself.

Shapes: R images and T texts of a tile, B pairs, N patches, M text positions, D embedding dimension.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ds_cmli.cmli.contrastive import contrastive_loss, temperature_scale, upcast
from ds_cmli.cmli.loss import l2_normalize
from ds_cmli.config.schema import LossConfig
from ds_cmli.losses.base import Loss, LossInputs, PairInputs, log_scale


class Filip(Loss):
    def __init__(self, config: LossConfig):
        super().__init__(config)
        self.logit_scale = log_scale(0.05)

    def forward(self, inputs: PairInputs) -> Tensor:
        i2t, t2i = inputs.cmli_scores  # [R, T] each, collective
        everywhere = inputs.row_logsumexp, inputs.column_logsumexp
        return contrastive_loss(i2t, t2i, self.logit_scale, inputs.own, *everywhere, inputs.duplicates)


class Grouping(Loss):
    """Each token is to be found by the patches that it selects, among the tokens of its text."""

    def __init__(self, config: LossConfig):
        super().__init__(config)
        self.logit_scale = log_scale(0.1)

    def forward(self, inputs: LossInputs) -> Tensor:
        project, mask = inputs.student.projection, inputs.batch.token_mask  # bool [B, M]
        patches = upcast(l2_normalize(project(inputs.features.patches)))  # [B, N, D]
        tokens = upcast(l2_normalize(project(inputs.features.tokens)))  # [B, M, D]
        similarity = tokens @ patches.mT  # [B, M, N]
        groups = F.relu(similarity - similarity.mean(2, keepdim=True)) @ patches
        logits = (l2_normalize(groups) @ tokens.mT) * temperature_scale(self.logit_scale)
        logits = logits.masked_fill(~mask[:, None], -1e4)  # [B, M, M]
        wanted = torch.arange(mask.shape[1], device=mask.device).expand(mask.shape)
        item = F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="none")
        return (item * mask.flatten()).sum() / mask.sum().clamp(min=1)
