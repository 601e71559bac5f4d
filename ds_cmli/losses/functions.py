"""Losses as pure functions of tensors, independent of processes, engines and data.

See `cmli/contrastive.py` too.

Shapes: B pairs, a tile of R images and T texts that are compared, N image patches, M text
positions, H hidden size, D embedding dimension. Equation numbers are those of the source document.
Everything is computed in fp32, or in fp64 for fp64 inputs.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ds_cmli.cmli.check import check_shapes
from ds_cmli.cmli.contrastive import check_tile, own_pairs, temperature_scale, upcast
from ds_cmli.cmli.inputs import full_precision


def sigmoid_loss(
    scores: Tensor,
    logit_scale: Tensor,
    bias: Tensor,
    first: int | None = None,
    positives: Tensor | None = None,
) -> Tensor:
    """-log sigmoid(z * (t * score + b)), summed over texts and averaged over the tile's R images.

    This is SigLIP's loss. z is 1 for positives and -1 for all others (Zhai et al., 2023, equation
    1). No normalisation
    over the batch: across ranks only the scores need the other ranks.

    Args:
        scores: [R, T] fp32 or fp64, images against texts.
        logit_scale: one element, ln(1/temperature).
        bias: one element, b.
        first: the column that belongs to row 0: row r's text is column first + r, if the tile has
            it. None: the tile is the whole batch, as many texts as images.
        positives: bool [R, T], further positives, see `duplicates`; None: there are none.

    Returns:
        A scalar. Summed over the tiles of the same images, and averaged over those of all ranks, it
        is the loss of the whole batch.

    Raises:
        ValueError: on shapes that do not fit.
    """
    check_tile(first, scores=scores, positives=positives)
    logits = temperature_scale(logit_scale) * scores + upcast(bias)  # [R, T]
    sign = torch.full_like(logits, -1.0)
    sign[own_pairs(logits, first or 0)] = 1.0
    if positives is not None:
        sign.masked_fill_(positives, 1.0)
    return -F.logsigmoid(sign * logits).sum(1).mean()


def duplicates(pair_id: Tensor, all_ids: Tensor, first: int = 0) -> Tensor:
    """Images and texts of different pairs that also match: bool [R, T].

    The pairs share the picture or the caption.

    Args:
        pair_id: int64 [R, 2], of the images, hashes of picture and caption: equal for equal
            pictures or captions.
        all_ids: int64 [T, 2], the same of the texts.
        first: the column that belongs to row 0, as in `sigmoid_loss`.
    """
    same = pair_id[:, :1] == all_ids[:, 0]
    same |= pair_id[:, 1:] == all_ids[:, 1]
    same.diagonal(first).fill_(False)  # a row's own text
    return same


def match_patches(tokens: Tensor, patches: Tensor) -> Tensor:
    """Equation (2) for the positive pairs: each token's patch of the highest cosine similarity.

    Args:
        tokens: [B, M, D], projected by g; of any norm and any float dtype.
        patches: [B, N, D], projected by the same g: with two different random projections, matches
            are random.

    Returns:
        int64 [B, M]. The index has no gradient, so this alone never trains g. Ties go to the lowest
        index.

    Raises:
        ValueError: on shapes that do not fit.
    """
    check_shapes(tokens=(tokens, "B M D"), patches=(patches, "B N D"))
    with torch.no_grad(), full_precision(tokens.device):
        tokens = F.normalize(upcast(tokens), dim=-1)
        patches = F.normalize(upcast(patches), dim=-1)
        similarity = tokens @ patches.transpose(1, 2)  # [B, M, N]
        return similarity.argmax(2)


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


def target_cmli_loss(
    student_patches: Tensor,
    student_tokens: Tensor,
    teacher_patches: Tensor,
    match: Tensor,
    token_mask: Tensor,
    reduction: str = "mean",
) -> Tensor:
    """Target-CMLI: equations (7) and (9), and their mean (10).

    The document writes (9) as a mean over k = 1..N although k counts text tokens. Here it is the
    mean over the M_j valid tokens of each text.

    Args:
        student_patches: [B, N, H].
        student_tokens: [B, M, H].
        teacher_patches: [B, N, H], the frozen teacher's, already layer-normalised.
        match: int64 [B, M] of `match_patches`: the teacher patch that each token regresses.
        token_mask: bool [B, M], True = valid (not [CLS], [SEP], [PAD]).
        reduction: "mean" or "sum" over H, see `squared_distance`.

    Raises:
        ValueError: on shapes that do not fit.
    """
    check_shapes(
        student_patches=(student_patches, "B N H"),
        student_tokens=(student_tokens, "B M H"),
        teacher_patches=(teacher_patches, "B N H"),
        match=(match, "B M"),
        token_mask=(token_mask, "B M"),
    )
    targets = teacher_patches.gather(
        1, match[:, :, None].expand(-1, -1, teacher_patches.shape[2])
    )  # [B, M, H]
    image = squared_distance(
        student_patches, teacher_patches, reduction
    ).mean()  # (7): over N patches and B images
    text = masked_mean(squared_distance(student_tokens, targets, reduction), token_mask)  # (9)
    return (image + text) / 2


def cls_distillation_loss(
    student_image: Tensor, student_text: Tensor, teacher_image: Tensor, reduction: str = "mean"
) -> Tensor:
    """Both class tokens regress the teacher's, the document's starting point: mean of both.

    All are [B, H].

    Raises ValueError on shapes that do not fit.
    """
    check_shapes(
        student_image=(student_image, "B H"),
        student_text=(student_text, "B H"),
        teacher_image=(teacher_image, "B H"),
    )
    image = squared_distance(student_image, teacher_image, reduction).mean()
    text = squared_distance(student_text, teacher_image, reduction).mean()
    return (image + text) / 2
