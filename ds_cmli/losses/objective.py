"""What the engine trains: the student, and the weighted sum of the chosen losses with their parameters."""

from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ds_cmli import losses
from ds_cmli.cmli import cmli_scores
from ds_cmli.config.schema import LossConfig
from ds_cmli.data import Batch
from ds_cmli.losses.base import Features, Loss, LossInputs, WidthHead
from ds_cmli.losses.functions import temperature_scale
from ds_cmli.models.student import Student
from ds_cmli.models.teacher import Targets


class Objective(nn.Module):
    ignored: Tensor

    def __init__(self, student: Student, config: LossConfig, teacher_width: int | None = None):
        super().__init__()
        self.config = config
        self.student = student
        self.losses = nn.ModuleDict({name: losses.load(name)(config) for name in config.weights})
        # Negatives of this rank's images that the last micro-batch ignored as captions of the same picture.
        self.register_buffer("ignored", torch.zeros((), dtype=torch.int64), persistent=False)
        self.width_head: WidthHead | None = None
        if teacher_width is not None and teacher_width != student.width:
            self.width_head = WidthHead(student.width, teacher_width)
        self.score = partial(
            cmli_scores,
            backend=config.cmli_backend,
            scratch_bytes=config.cmli_scratch_bytes,
            recompute=config.cmli_recompute,
        )

    def forward(self, batch: Batch, targets: Targets | None) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum of this rank's mean losses (a scalar in fp32), and each of them by name, detached.

        Averaged over ranks both are those of the global batch. Collective.
        """
        features = Features(*self.student(batch.image, batch.input_ids, batch.attention_mask))
        inputs = LossInputs(features, batch, targets, self.student, self.width_head, self.score)
        each = {name: loss(inputs) for name, loss in self.losses.items()}  # collectives
        if "ignore" in vars(inputs):  # some loss compared pairs
            self.ignored.copy_(inputs.ignore.sum())
        total = torch.stack([weight * each[name] for name, weight in self.config.weights.items()]).sum()
        return total, {name: loss.detach() for name, loss in each.items()}

    def scales(self) -> dict[str, float]:
        """1/temperature of each loss that has one, by name. CPU-GPU sync; collective where ZeRO-3 partitions them."""
        logarithms: dict[str, Any] = {n: x.logit_scale for n, x in self.losses.items() if hasattr(x, "logit_scale")}
        with torch.no_grad(), _whole([*logarithms.values()]):
            return {name: temperature_scale(x).item() for name, x in logarithms.items()}

    def score_scales(self) -> dict[str, float]:
        """The same by the pair scores that a loss compares, "global" or "cmli": of the first loss of each kind."""
        out: dict[str, float] = {}
        for name, scale in self.scales().items():
            loss: Loss = self.losses[name]  # type: ignore[assignment]
            out.setdefault(loss.scores, scale)
        return out


def _whole(parameters: list[Tensor]) -> AbstractContextManager:
    """Parameters with all their elements: ZeRO-3 may hold a part alone at any time, after a skipped step for one."""
    if not any(hasattr(p, "ds_id") for p in parameters):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(parameters)  # collective
