"""What a loss is, and what it is computed from.

Shapes: B pairs per rank, P ranks, G = B * P, N patches, M text positions, H student width, H_t teacher width,
D embedding dimension.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ds_cmli.cmli.loss import l2_normalize, score_global_batch
from ds_cmli.cmli.token_keep import select
from ds_cmli.config.schema import LossConfig
from ds_cmli.data import Batch
from ds_cmli.distributed import process_group as distributed
from ds_cmli.losses.functions import duplicates, upcast
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


class PairInputs(ABC):
    """What a loss that compares pairs sees: R images, this rank's whole micro-batch or a part of it, and all G texts.

    Pair scores are computed once, for whichever losses compare them.
    """

    @property
    @abstractmethod
    def first(self) -> int:
        """The column of the pair scores that belongs to row 0."""

    @property
    @abstractmethod
    def duplicates(self) -> Tensor | None:
        """bool [R, G], images and texts of other pairs that are no negatives: they have the same picture or caption.

        None: all others are negatives. Collective.
        """

    @property
    @abstractmethod
    def global_scores(self) -> Tensor:
        """[R, G] fp32 (fp64), cosines of the images' and all texts' class tokens. Collective."""

    @property
    @abstractmethod
    def cmli_scores(self) -> tuple[Tensor, Tensor]:
        """s_i2t and s_t2i [R, G] fp32 (fp64), CMLI of the images and all texts. Collective."""

    @abstractmethod
    def column_logsumexp(self, logits: Tensor) -> Tensor:
        """log(sum(exp)) of each column over all images of the batch, not these R alone: [R, G] -> [G]. Collective.

        A loss must be linear in it, as a cross entropy is: its value comes after its gradient.
        """


@dataclass
class LossInputs(PairInputs):
    """One micro-batch as the losses see it, with its own negatives."""

    features: Features
    batch: Batch
    targets: Targets | None  # the teacher's features; None where no loss needs them
    student: Student
    width_head: WidthHead | None
    score: Callable[..., tuple[Tensor, Tensor]]  # `cmli_scores` with its options
    config: LossConfig = field(default_factory=LossConfig)

    @property
    def first(self) -> int:
        return distributed.rank() * len(self.batch.index)

    @cached_property
    def duplicates(self) -> Tensor | None:
        ids = self.batch.pair_id
        return (
            None if self.config.duplicates == "keep" else duplicates(ids, distributed.gather(ids), self.first)
        )  # collective

    @cached_property
    def global_scores(self) -> Tensor:
        image = upcast(l2_normalize(self.features.image_cls))  # [B, H]
        text = distributed.gather_with_gradient(upcast(l2_normalize(self.features.text_cls)))  # [G, H], collective
        return image @ text.t()

    @cached_property
    def cmli_scores(self) -> tuple[Tensor, Tensor]:
        patches, tokens = self.student.projection(self.features.patches), self.student.projection(self.features.tokens)
        mask = self.batch.token_mask
        if self.config.cmli_token_keep < 1:
            selection = select(patches, tokens, mask, self.config.cmli_token_keep, self.config.cmli_scratch_bytes)
            (patches, tokens), mask = selection.of(patches, tokens), selection.token_mask
        return score_global_batch(patches, tokens, mask, score=self.score)

    def column_logsumexp(self, logits: Tensor) -> Tensor:
        return distributed.column_logsumexp(logits)  # collective

    @property
    def teacher(self) -> Targets:
        assert self.targets is not None, "the registry says of no chosen loss that it needs the teacher"
        return self.targets

    def to_teacher(self, x: Tensor) -> Tensor:
        """[.., H] -> [.., H_t]."""
        return x if self.width_head is None else self.width_head(x)


class Loss(nn.Module):
    """One loss with its own parameters: a file of this folder defines one, the table in `losses` names it.

    A temperature is the parameter `logit_scale`, ln(1/temperature), made by `log_scale`; it is logged as
    `temperature/<name>`.
    """

    logit_scale: nn.Parameter  # only of a loss with a temperature

    def __init__(self, config: LossConfig):
        super().__init__()
        self.config = config

    def forward(self, inputs: Any) -> Tensor:
        """A scalar in fp32 (fp64), the mean over the pairs of `inputs`; the ranks' mean is that of the global batch.

        `inputs` is `LossInputs`, or `PairInputs` for a loss that compares pairs: the table in `losses` says which do.
        """
        raise NotImplementedError


def log_scale(temperature: float) -> nn.Parameter:
    """ln(1/temperature), learned."""
    # One element, not zero dimensions: DeepSpeed sends parameters as bytes, which a 0-dim tensor has no view of.
    return nn.Parameter(torch.tensor([math.log(1 / temperature)]))
