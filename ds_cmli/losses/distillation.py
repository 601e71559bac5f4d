"""Distillation of patches and tokens, and of class tokens.

Target-CMLI: each token regresses its best-matching teacher patch, equations (5) to (10) of the
source document. (10) is the mean of (7), the patches' loss, and (9), the tokens'. The regression of
the class tokens is the document's starting point.
"""

import torch
from torch import Tensor

from ds_cmli.losses import functions
from ds_cmli.losses.base import Loss
from ds_cmli.losses.inputs import LossInputs


class TargetCMLI(Loss):
    """Equation (10), whose two halves have weights."""

    def forward(self, inputs: LossInputs) -> Tensor:
        config, halves = self.config, []
        if config.target_text_weight:
            halves.append(config.target_text_weight / 2 * self.of_text(inputs))
        if config.target_image_weight:
            halves.append(config.target_image_weight / 2 * self.of_image(inputs))
        return torch.stack(halves).sum()

    def of_image(self, inputs: LossInputs) -> Tensor:
        """Equation (7)."""
        patches, reduction = inputs.to_teacher(inputs.features.patches), self.config.mse_reduction
        mask = inputs.features.patch_mask
        return functions.target_image_loss(patches, inputs.teacher.patches, reduction, mask)

    def of_text(self, inputs: LossInputs) -> Tensor:
        """Equation (9)."""
        match, tokens = self.match(inputs), inputs.to_teacher(inputs.features.tokens)
        mask, reduction = inputs.batch.token_mask, self.config.mse_reduction
        return functions.target_text_loss(tokens, inputs.teacher.patches, match, mask, reduction)

    @torch.no_grad()
    def match(self, inputs: LossInputs) -> Tensor:
        """The teacher patch of each token, the most similar one: int64 [C, M]."""
        features, project = inputs.features, inputs.student.projection
        patches = inputs.teacher.patches
        if inputs.width_head is not None:
            patches = inputs.width_head(patches, back=True)
        # The match has no gradient, so only an all-pairs loss trains the projection.
        similarity = functions.patch_similarities(project(features.tokens), project(patches))
        if features.patch_mask is not None:
            mask = features.patch_mask.repeat_interleave(len(similarity) // len(patches), 0)
            similarity.masked_fill_(~mask[:, None, :], -torch.inf)  # [C, 1, N]
        return similarity.argmax(2)


class ClsDistillation(Loss):
    """The class tokens of image and text regress the teacher's: the mean of both."""

    def forward(self, inputs: LossInputs) -> Tensor:
        return functions.cls_distillation_loss(
            inputs.to_teacher(inputs.features.image_cls),
            inputs.to_teacher(inputs.features.text_cls),
            inputs.teacher.cls,
            self.config.mse_reduction,
        )
