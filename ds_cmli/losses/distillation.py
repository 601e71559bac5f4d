"""Distillation of patches and tokens, and of class tokens.

Target-CMLI: each token regresses its best-matching teacher patch, equations (5) to (10) of the
source document. (10) is the mean of (7), the patches' loss, and (9), the tokens'. Each can be had
alone, with a weight of its own. The regression of the class tokens is the document's starting
point.
"""

import torch
from torch import Tensor

from ds_cmli.config.validation import check
from ds_cmli.losses import functions
from ds_cmli.losses.base import Loss
from ds_cmli.losses.inputs import LossInputs


class TokenTargets(Loss):
    """A loss that gives each token teacher patches as target, those that it matches."""

    def fit(self, patches: int, teacher_width: int | None) -> None:
        top, need = self.config.target_top, f"an image has {patches} patches: give fewer"
        check(self.config.target != "top" or top <= patches, "loss.target_top", top, need)

    def match(self, inputs: LossInputs) -> Tensor:
        """The teacher patches of each token, as `functions.choose_patches` returns them."""
        config = self.config
        similarities, temperature = self.similarities(inputs), config.cmli_init_temperature
        return functions.choose_patches(similarities, config.target, config.target_top, temperature)

    @torch.no_grad()
    def similarities(self, inputs: LossInputs) -> Tensor:
        """What tokens and patches are matched by: [C, M, N] fp32 (fp64)."""
        features, project = inputs.features, inputs.student.projection
        patches = features.patches
        if self.config.match == "teacher":
            patches = inputs.teacher.patches
            if inputs.width_head is not None:
                patches = inputs.width_head(patches, back=True)
        # The match has no gradient, so only an all-pairs loss trains the projection.
        similarity = functions.patch_similarities(project(features.tokens), project(patches))
        if features.patch_mask is None:
            return similarity
        mask = features.patch_mask.repeat_interleave(len(similarity) // len(patches), 0)  # [C, N]
        return similarity.masked_fill_(~mask[:, None, :], -torch.inf)

    def counted(self, inputs: LossInputs) -> Tensor:
        """The tokens that the loss is a mean over: bool [C, M]."""
        return inputs.batch.token_mask


class TargetImage(Loss):
    """Equation (7)."""

    def forward(self, inputs: LossInputs) -> Tensor:
        patches, reduction = inputs.to_teacher(inputs.features.patches), self.config.mse_reduction
        mask = inputs.features.patch_mask
        return functions.target_image_loss(patches, inputs.teacher.patches, reduction, mask)


class TargetText(TokenTargets):
    """Equation (9)."""

    def forward(self, inputs: LossInputs) -> Tensor:
        match, tokens = self.match(inputs), inputs.to_teacher(inputs.features.tokens)
        mask, reduction = self.counted(inputs), self.config.mse_reduction
        return functions.target_text_loss(tokens, inputs.teacher.patches, match, mask, reduction)


class TargetCMLI(TargetText, TargetImage):
    """Equation (10)."""

    def forward(self, inputs: LossInputs) -> Tensor:
        text = TargetText.forward(self, inputs)
        return (TargetImage.forward(self, inputs) + text) / 2


class ClsDistillation(Loss):
    """The class tokens of image and text regress the teacher's: the mean of both."""

    def forward(self, inputs: LossInputs) -> Tensor:
        return functions.cls_distillation_loss(
            inputs.to_teacher(inputs.features.image_cls),
            inputs.to_teacher(inputs.features.text_cls),
            inputs.teacher.cls,
            self.config.mse_reduction,
        )
