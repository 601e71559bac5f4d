"""Distillation of the class tokens: those of image and text regress the teacher's.

This is the starting point of the source document.
"""

from torch import Tensor

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
