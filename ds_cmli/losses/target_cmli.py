"""Target-CMLI: each token regresses its best-matching teacher patch.

Equations (5) to (10) of the source document: (10) is the mean of (7), the patches' loss, and (9),
the tokens'. Each can be had alone, with a weight of its own.
"""

import torch
from torch import Tensor

from ds_cmli.config.validation import check
from ds_cmli.losses.base import Loss, LossInputs, Sizes
from ds_cmli.losses.functions import (
    choose_patches,
    patch_similarities,
    target_cmli_loss,
    target_image_loss,
    target_text_loss,
)


class TokenTargets(Loss):
    """A loss that gives each token teacher patches as target, those that it matches."""

    def fit(self, sizes: Sizes) -> None:
        top, need = self.config.target_top, f"an image has {sizes.patches} patches: give fewer"
        fits = self.config.target != "top" or top <= sizes.patches
        check(fits, "loss.target_top", top, need)

    def match(self, inputs: LossInputs) -> Tensor:
        """The teacher patches of each token, as `functions.choose_patches` returns them."""
        config = self.config
        return choose_patches(
            self.similarities(inputs),
            config.target,
            config.target_top,
            config.cmli_init_temperature,
        )

    @torch.no_grad()
    def similarities(self, inputs: LossInputs) -> Tensor:
        """What tokens and patches are matched by: [B, M, N] fp32 (fp64)."""
        features, project = inputs.features, inputs.student.projection
        patches = features.patches
        if self.config.match == "teacher":
            patches = inputs.teacher.patches
            if inputs.width_head is not None:
                patches = inputs.width_head(patches, back=True)
        # The match has no gradient, so only an all-pairs loss trains the projection.
        return patch_similarities(project(features.tokens), project(patches))

    def counted(self, inputs: LossInputs) -> Tensor:
        """The tokens that the loss is a mean over: bool [B, M]."""
        return inputs.batch.token_mask


class TargetCMLI(TokenTargets):
    """Equation (10)."""

    def forward(self, inputs: LossInputs) -> Tensor:
        match = self.match(inputs)
        return target_cmli_loss(
            inputs.to_teacher(inputs.features.patches),
            inputs.to_teacher(inputs.features.tokens),
            inputs.teacher.patches,
            match,
            self.counted(inputs),
            self.config.mse_reduction,
        )


class TargetImage(Loss):
    """Equation (7)."""

    def forward(self, inputs: LossInputs) -> Tensor:
        patches = inputs.to_teacher(inputs.features.patches)
        return target_image_loss(patches, inputs.teacher.patches, self.config.mse_reduction)


class TargetText(TokenTargets):
    """Equation (9)."""

    def forward(self, inputs: LossInputs) -> Tensor:
        match = self.match(inputs)
        return target_text_loss(
            inputs.to_teacher(inputs.features.tokens),
            inputs.teacher.patches,
            match,
            self.counted(inputs),
            self.config.mse_reduction,
        )
