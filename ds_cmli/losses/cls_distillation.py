"""Distillation of the class tokens: those of image and text regress the teacher's, or find it.

The regression is the starting point of the source document. Both are the mean of both directions.
"""

import torch
from torch import Tensor

from ds_cmli.losses.bank import AgainstTeacher
from ds_cmli.losses.base import Loss, LossInputs
from ds_cmli.losses.functions import cls_distillation_loss


class ClsDistillation(Loss):
    def forward(self, inputs: LossInputs) -> Tensor:
        return cls_distillation_loss(
            inputs.to_teacher(inputs.features.image_cls),
            inputs.to_teacher(inputs.features.text_cls),
            inputs.teacher.cls,
            self.config.mse_reduction,
        )


class ClsContrast(AgainstTeacher):
    """Its negatives are the teacher's class tokens of other images, and a bank of them."""

    def forward(self, inputs: LossInputs) -> Tensor:
        features, teacher = inputs.features, inputs.teacher.cls
        both = inputs.to_teacher(torch.stack([features.image_cls, features.text_cls], 1))
        targets = teacher[:, None].expand(both.shape)  # [B, 2, H_t]
        return self.contrast(inputs, both, targets, teacher).mean()  # collective
