"""Target-CMLI: each token regresses its best-matching teacher patch, equations (5) to (10) of the
source document; and the regression of the class tokens, the document's starting point.

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
    """A linear map from the student's to the teacher's width, for widths that differ.

    It is initialised orthonormal.
    """

    def __init__(self, width: int, teacher_width: int):
        super().__init__(width, teacher_width, bias=False)
        nn.init.orthogonal_(self.weight)

    def forward(self, x: Tensor, back: bool = False) -> Tensor:
        """[.., H] -> [.., H_t].

        `back`: the reverse, by the transpose, the pseudo-inverse of an orthonormal map.
        """
        return nn.functional.linear(x, self.weight.t() if back else self.weight)


def patch_similarities(tokens: Tensor, patches: Tensor) -> Tensor:
    """Cosine similarities of the tokens [B, M, D] and patches [B, N, D] of each pair: [B, M, N],
    without a gradient.

    Both are projected by the same g: with two different random projections, matches are random.
    """
    with torch.no_grad(), full_precision(tokens.device):
        tokens, patches = l2_normalize(upcast(tokens)), l2_normalize(upcast(patches))
        return tokens @ patches.transpose(1, 2)


def match_patches(tokens: Tensor, patches: Tensor) -> Tensor:
    """Equation (2) for the pairs: each token's patch of the highest cosine similarity.

    int64 [B, M]. The index has no gradient, so this alone never trains g. Ties go to the lowest
    index.
    """
    return patch_similarities(tokens, patches).argmax(2)


def squared_distance(x: Tensor, y: Tensor, reduction: str) -> Tensor:
    """||x - y||^2 over the last dimension H: its sum or its mean.

    (7) and (9) are written with the sum; the mean is the usual "MSE". The trainer uses the mean by
    default: the document wants this loss and the contrastive loss to weigh the same, and the sum is
    H times larger.
    """
    square = (upcast(x) - upcast(y)).square()
    return square.mean(-1) if reduction == "mean" else square.sum(-1)


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over the valid positions of each row, then over rows; empty rows give 0.

    [B, M], bool [B, M] -> scalar.
    """
    count = mask.sum(1).clamp(min=1)
    return ((values * mask).sum(1) / count).mean()


def target_image_loss(
    student_patches: Tensor, teacher_patches: Tensor, reduction: str = "mean"
) -> Tensor:
    """Equation (7): each patch regresses the teacher's at the same place; both are [B, N, H]."""
    return squared_distance(student_patches, teacher_patches, reduction).mean()


def target_text_loss(
    student_tokens: Tensor,
    teacher_patches: Tensor,
    match: Tensor,
    token_mask: Tensor,
    reduction: str = "mean",
) -> Tensor:
    """Equation (9): each valid token regresses the teacher's feature at its match.

    The document writes (9) as a mean over k = 1..N although k counts text tokens. Here it is the
    mean over the M_j valid tokens of each text.

    Args:
        student_tokens: [B, M, H].
        teacher_patches: [B, N, H], the frozen teacher's, already layer-normalised.
        match: int64 [B, M].
        token_mask: bool [B, M], True = valid (not [CLS], [SEP], [PAD]).
        reduction: "mean" or "sum" over H, see `squared_distance`.
    """
    index = match[:, :, None].expand(-1, -1, teacher_patches.shape[2])
    targets = teacher_patches.gather(1, index)  # [B, M, H]
    return masked_mean(squared_distance(student_tokens, targets, reduction), token_mask)


class TargetCMLI(nn.Module):
    """Equation (10): the mean of (7), the patches' loss, and (9), the tokens', with weights."""

    def __init__(self, config: LossConfig, student: Student, teacher_width: int | None = None):
        super().__init__()
        self.reduction = config.mse_reduction
        self.image, self.text = config.target_image_weight / 2, config.target_text_weight / 2

    def forward(
        self, f: Features, targets: Targets, student: Student, head: WidthHead | None
    ) -> Tensor:
        """`head` maps the student's features to the teacher's width; None: they are equal."""
        patches, tokens, halves = f.patches, f.tokens, list[Tensor]()
        if head is not None:
            patches, tokens = head(patches), head(tokens)
        if self.text:
            match = self.match(f, targets, student, head)
            loss = target_text_loss(tokens, targets.patches, match, f.token_mask, self.reduction)
            halves.append(self.text * loss)
        if self.image:
            loss = target_image_loss(patches, targets.patches, self.reduction)
            halves.append(self.image * loss)
        return torch.stack(halves).sum()

    @torch.no_grad()
    def match(
        self, f: Features, targets: Targets, student: Student, head: WidthHead | None
    ) -> Tensor:
        """The teacher patch of each token, int64 [B, M]; only an all-pairs loss trains the
        projection."""
        patches = targets.patches if head is None else head(targets.patches, back=True)
        similar = patch_similarities(student.projection(f.tokens), student.projection(patches))
        return similar.argmax(2)


class ClsDistillation(nn.Module):
    """The class tokens of image and text regress the teacher's: the mean of both."""

    def __init__(self, config: LossConfig, student: Student, teacher_width: int | None = None):
        super().__init__()
        self.reduction = config.mse_reduction

    def forward(
        self, f: Features, targets: Targets, student: Student, head: WidthHead | None
    ) -> Tensor:
        sides = [f.image_cls, f.text_cls]
        if head is not None:
            sides = [head(x) for x in sides]
        image, text = (squared_distance(x, targets.cls, self.reduction).mean() for x in sides)
        return (image + text) / 2
