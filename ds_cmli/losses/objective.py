"""What the engine trains: the student, the temperatures, and the sum of the chosen losses.

Shapes: B pairs per rank, N patches, M text positions, H student width, H_t teacher width, D matching space.
"""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ds_cmli.cmli.loss import CMLILoss, unit
from ds_cmli.config.schema import LossConfig
from ds_cmli.data import Batch
from ds_cmli.distributed import process_group as distributed
from ds_cmli.losses import functions as losses
from ds_cmli.models.student import Student
from ds_cmli.models.teacher import Targets


@dataclass
class Features:
    """The student's view of a batch. Not normalised, in the model's precision."""

    image_cls: Tensor  # [B, H]
    patches: Tensor  # [B, N, H]
    text_cls: Tensor  # [B, H]
    tokens: Tensor  # [B, M, H], padding and special tokens included


class WidthHead(nn.Linear):
    """Student width -> teacher width, where they differ; orthonormal at the start."""

    def __init__(self, width: int, teacher_width: int):
        super().__init__(width, teacher_width, bias=False)
        nn.init.orthogonal_(self.weight)

    def forward(self, x: Tensor, back: bool = False) -> Tensor:
        """[.., H] -> [.., H_t], or `back` by the transpose: for an orthonormal map that is its pseudo-inverse."""
        return F.linear(x, self.weight.t() if back else self.weight)


class Objective(nn.Module):
    def __init__(self, student: Student, config: LossConfig, teacher_width: int | None = None):
        super().__init__()
        self.config = config
        self.student = student
        if "global" in config.weights:
            self.logit_scale = nn.Parameter(torch.tensor([math.log(1 / config.init_temperature)]))
        if "cmli" in config.weights:
            self.cmli = CMLILoss(
                config.cmli_init_temperature,
                backend=config.cmli_backend,
                scratch_bytes=config.cmli_scratch_bytes,
                recompute=config.cmli_recompute,
            )
        self.width_head: WidthHead | None = None
        if teacher_width is not None and teacher_width != student.width:
            self.width_head = WidthHead(student.width, teacher_width)

    def forward(self, batch: Batch, targets: Targets | None) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum of this rank's mean losses (a scalar in fp32), and each of them by name, detached.

        Averaged over ranks both are those of the global batch.
        """
        features = Features(*self.student(batch.image, batch.input_ids, batch.attention_mask))
        compute: dict[str, Callable[..., Tensor]] = {
            "global": self.global_loss,
            "cmli": self.cmli_loss,
            "target_cmli": self.target_cmli_loss,
            "cls_kd": self.cls_kd_loss,
        }
        each = {name: compute[name](features, batch, targets) for name in self.config.weights}
        total = torch.stack([weight * each[name] for name, weight in self.config.weights.items()]).sum()
        return total, {name: loss.detach() for name, loss in each.items()}

    def global_loss(self, features: Features, batch: Batch, targets: Targets | None) -> Tensor:
        image = losses.widen(unit(features.image_cls))  # [B, H]
        # Collective: the class tokens of all ranks' texts.
        text = distributed.gather_with_gradient(losses.widen(unit(features.text_cls)))  # [G, H]
        scores = image @ text.t()  # [B, G]
        first = distributed.rank() * image.shape[0]
        return losses.contrastive_loss(
            scores, scores, self.logit_scale, first, partial(distributed.column_logsumexp, group=None)
        )

    def cmli_loss(self, features: Features, batch: Batch, targets: Targets | None) -> Tensor:
        return self.cmli(self.student.g(features.patches), self.student.g(features.tokens), batch.token_mask)

    def target_cmli_loss(self, features: Features, batch: Batch, targets: Targets) -> Tensor:
        # The index passes no gradient: g learns only where the all-pairs loss trains it.
        with torch.no_grad():
            patches = features.patches
            if self.config.match == "teacher":
                patches = targets.patches if self.width_head is None else self.width_head(targets.patches, back=True)
            match = losses.match_patches(self.student.g(features.tokens), self.student.g(patches))  # [B, M]
        return losses.target_cmli_loss(
            self.to_teacher(features.patches),
            self.to_teacher(features.tokens),
            targets.patches,
            match,
            batch.token_mask,
            self.config.mse_reduction,
        )

    def cls_kd_loss(self, features: Features, batch: Batch, targets: Targets) -> Tensor:
        return losses.cls_distillation_loss(
            self.to_teacher(features.image_cls),
            self.to_teacher(features.text_cls),
            targets.cls,
            self.config.mse_reduction,
        )

    def to_teacher(self, x: Tensor) -> Tensor:
        """[.., H] -> [.., H_t]."""
        return x if self.width_head is None else self.width_head(x)

    def scales(self) -> dict[str, float]:
        """1/temperature of each contrastive loss. CPU-GPU sync; collective where ZeRO-3 has partitioned them."""
        logarithms = {"global": getattr(self, "logit_scale", None)}
        if "cmli" in self.config.weights:
            logarithms["cmli"] = self.cmli.logit_scale
        present = {name: x for name, x in logarithms.items() if x is not None}
        with torch.no_grad(), _whole(list(present.values())):
            return {name: losses.temperature_scale(x).item() for name, x in present.items()}


def _whole(parameters: list[Tensor]) -> AbstractContextManager:
    """Parameters with all their elements: ZeRO-3 may hold a part alone at any time, after a skipped step for one."""
    if not any(hasattr(p, "ds_id") for p in parameters):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(parameters)  # collective
