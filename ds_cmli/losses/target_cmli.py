"""Target-CMLI: each token regresses its best-matching teacher patch, equations (5) to (10) of the
source document (docs/method.md); and the regression of the class tokens, its starting point.

Everything is computed in fp32, or in fp64 for fp64 inputs.

Shapes: B pairs, N image patches, M text positions, H hidden size, D embedding dimension.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ds_cmli.cmli.normalize import l2_normalize
from ds_cmli.cmli.sides import full_precision, upcast
from ds_cmli.config.schema import LossConfig
from ds_cmli.models.student import Student, Targets


class Features(NamedTuple):
    """The student's features of a batch, not normalised, in the model's precision."""

    image_cls: Tensor  # [B, H]
    patches: Tensor  # [B, N, H]
    text_cls: Tensor  # [B, H]
    tokens: Tensor  # [B, M, H], padding and special tokens included
    token_mask: Tensor  # bool [B, M]


class WidthHead(nn.Linear):
    """A linear map from the student's to the teacher's width, orthonormal at the start."""

    def __init__(self, width: int, teacher_width: int):
        super().__init__(width, teacher_width, bias=False)
        nn.init.orthogonal_(self.weight)

    def forward(self, x: Tensor, back: bool = False) -> Tensor:
        """Map [.., H] to the teacher's [.., H_t]; `back`: map [.., H_t] to [.., H].

        The way back is the transpose, the pseudo-inverse of an orthonormal map.
        """
        return nn.functional.linear(x, self.weight.t() if back else self.weight)


def match_patches(tokens: Tensor, patches: Tensor) -> Tensor:
    """Return the patch of its pair that has the highest cosine with each token, int64 [B, M].

    It is the argmax of equation (2). The index has no gradient, so this alone trains no projection.
    Ties go to the lowest index. Tokens [B, M, D] and patches [B, N, D] are of one projection: by
    two random ones, matches are random.
    """
    with torch.no_grad(), full_precision(tokens.device):
        unit_tokens = l2_normalize(upcast(tokens))
        unit_patches = l2_normalize(upcast(patches))
        return (unit_tokens @ unit_patches.transpose(1, 2)).argmax(2)


def squared_distance(x: Tensor, y: Tensor, reduction: str) -> Tensor:
    """Return ||x - y||^2 over the last dimension H, as its sum or its mean.

    (7) and (9) are written with the sum. The trainer's default is the mean: the document wants this
    loss and the contrastive loss to weigh the same, and the sum is H times larger.
    """
    square = (upcast(x) - upcast(y)).square()
    return square.mean(-1) if reduction == "mean" else square.sum(-1)


def target_text_loss(
    student_tokens: Tensor,  # [B, M, H]
    teacher_patches: Tensor,  # [B, N, H], the frozen teacher's, already layer-normalised
    match: Tensor,  # int64 [B, M]
    token_mask: Tensor,  # bool [B, M], True = valid (not [CLS], [SEP], [PAD])
    reduction: str,
) -> Tensor:
    """Regress each valid token on the teacher's feature at its match: equation (9).

    The document writes (9) as a mean over k = 1..N although k counts text tokens. Here it is the
    mean over the M_j valid tokens of each text, 0 without any, and then over texts.
    """
    index = match[:, :, None].expand(-1, -1, teacher_patches.shape[2])
    targets = teacher_patches.gather(1, index)  # [B, M, H]
    distance = squared_distance(student_tokens, targets, reduction)
    count = token_mask.sum(1).clamp(min=1)
    return ((distance * token_mask).sum(1) / count).mean()


class TargetCMLI(nn.Module):
    """The weighted mean of the patches' loss (7) and the tokens' loss (9): equation (10)."""

    def __init__(self, config: LossConfig, student: Student, teacher_width: int | None = None):
        super().__init__()
        self.reduction = config.mse_reduction
        self.image_weight = config.target_image_weight / 2
        self.text_weight = config.target_text_weight / 2

    def forward(
        self, features: Features, targets: Targets, student: Student, head: WidthHead | None
    ) -> Tensor:
        """Return the loss of this rank's pairs, a scalar; `head` None: the widths are equal."""
        patches = features.patches
        tokens = features.tokens
        if head is not None:
            patches = head(patches)
            tokens = head(tokens)
        terms: list[Tensor] = []
        if self.text_weight:
            teacher_patches = targets.patches
            with torch.no_grad():  # only an all-pairs loss trains this projection
                if head is not None:
                    teacher_patches = head(teacher_patches, back=True)
                match = match_patches(
                    student.projection(features.tokens), student.projection(teacher_patches)
                )
            loss = target_text_loss(
                tokens, targets.patches, match, features.token_mask, self.reduction
            )
            terms.append(self.text_weight * loss)
        if self.image_weight:
            loss = squared_distance(patches, targets.patches, self.reduction).mean()  # equation (7)
            terms.append(self.image_weight * loss)
        return torch.stack(terms).sum()


class ClsDistillation(nn.Module):
    """The mean of the class tokens' losses: image and text regress the teacher's class token."""

    def __init__(self, config: LossConfig, student: Student, teacher_width: int | None = None):
        super().__init__()
        self.reduction = config.mse_reduction

    def forward(
        self, features: Features, targets: Targets, student: Student, head: WidthHead | None
    ) -> Tensor:
        losses = []
        for student_cls in (features.image_cls, features.text_cls):
            cls = student_cls if head is None else head(student_cls)
            losses.append(squared_distance(cls, targets.cls, self.reduction).mean())
        return torch.stack(losses).sum() / 2
