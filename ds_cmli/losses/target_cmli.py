"""Target-CMLI: each token regresses its best-matching teacher patch.

Equations (5) to (10) of the source document.
"""

import torch
from torch import Tensor

from ds_cmli.losses.base import Loss, LossInputs
from ds_cmli.losses.functions import match_patches, target_cmli_loss


class TargetCMLI(Loss):
    def forward(self, inputs: LossInputs) -> Tensor:
        features, project = inputs.features, inputs.student.projection
        # The index has no gradient, so only an all-pairs loss trains the projection.
        with torch.no_grad():
            patches = features.patches
            if self.config.match == "teacher":
                patches = inputs.teacher.patches
                if inputs.width_head is not None:
                    patches = inputs.width_head(patches, back=True)
            match = match_patches(project(features.tokens), project(patches))  # [B, M]
        return target_cmli_loss(
            inputs.to_teacher(features.patches),
            inputs.to_teacher(features.tokens),
            inputs.teacher.patches,
            match,
            inputs.batch.token_mask,
            self.config.mse_reduction,
        )
