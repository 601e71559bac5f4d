"""Losses as pure functions of tensors, independent of processes, engines and data.

See `cmli/contrastive.py` too.

Shapes: B images, each with K texts of its own, C = B * K texts, image by image; a tile of R images
and T texts that are compared, N image patches, M text positions, H hidden size, D embedding
dimension. Equation numbers are those of the source document.
Everything is computed in fp32, or in fp64 for fp64 inputs.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ds_cmli.cmli.contrastive import (
    MAX_SCALE,
    Own,
    check_tile,
    temperature_scale,
    unit_rows,
    upcast,
)
from ds_cmli.cmli.inputs import check_shapes, full_precision
from ds_cmli.losses.own_texts import by_image


def sigmoid_loss(
    scores: Tensor,
    logit_scale: Tensor,
    bias: Tensor,
    first: int | Own | None = None,
    positives: Tensor | None = None,
    max_scale: float = MAX_SCALE,
    ignore: Tensor | None = None,
) -> Tensor:
    """-log sigmoid(z * (t * score + b)), summed over texts and averaged over the tile's R images.

    This is SigLIP's loss. z is 1 for positives and -1 for all others (Zhai et al., 2023, equation
    1). No normalisation over the batch: across ranks only the scores need the other ranks. With K
    right texts of an image it is divided by K, as in the code of FLAIR (Xiao et al., 2025).

    Args:
        scores: [R, T] fp32 or fp64, images against texts.
        logit_scale: one element, ln(1/temperature).
        bias: one element, b.
        first: the column that belongs to row 0: row r's text is column first + r, if the tile has
            it; or the columns of K texts of each image, as `Own`. None: the tile is the whole
            batch, as many texts as images.
        positives: bool [R, T], further positives, see `duplicates`; None: there are none.
        max_scale: the maximum of 1/temperature.
        ignore: bool [R, T], pairs that do not count, see `left_out`; None: all count.

    Returns:
        A scalar. Summed over the tiles of the same images, and averaged over those of all ranks, it
        is the loss of the whole batch.

    Raises:
        ValueError: on shapes that do not fit.
    """
    check_tile(first, scores=scores, positives=positives, ignore=ignore)
    logits = temperature_scale(logit_scale, max_scale) * scores + upcast(bias)  # [R, T]
    own, sign = Own.of(first), torch.full_like(logits, -1.0)
    # A number would come from the host: a CPU-GPU sync.
    sign.index_put_(own.pairs(logits), sign.new_ones(()))
    if positives is not None:
        sign.masked_fill_(positives, 1.0)
    values = F.logsigmoid(sign * logits)
    if ignore is not None:
        values = values.masked_fill(ignore, 0.0)
    return -values.sum(1).mean() / own.right


def duplicates(pair_id: Tensor, all_ids: Tensor, first: int | Own = 0) -> Tensor:
    """Images and texts of different pairs that also match: bool [R, T].

    The text is of the same picture, and right, or it is equal to one of the image's right ones.

    Args:
        pair_id: int64 [R, 1 + W], of the images, hashes of the picture and its captions: equal for
            equal pictures or captions.
        all_ids: int64 [T, 2], of the texts, hashes of picture and caption, see `ids_of_texts`.
        first: the columns that belong to the rows, as in `sigmoid_loss`.
    """
    own = Own.of(first)
    same = pair_id[:, :1] == all_ids[:, 0]
    for k in range(own.right):
        same |= pair_id[:, k + 1 : k + 2] == all_ids[:, 1]
    for k, columns in zip(range(own.right), own.of_each(same), strict=False):
        columns.diagonal((own.first + k) // own.texts).fill_(False)  # the rows' own k-th texts
    return same


def patch_similarities(tokens: Tensor, patches: Tensor) -> Tensor:
    """Cosine similarities of the tokens and patches of each positive pair.

    Args:
        tokens: [C, M, D], projected by g; of any norm and any float dtype.
        patches: [B, N, D], projected by the same g: with two different random projections, matches
            are random.

    Returns:
        [C, M, N] fp32 (fp64), without a gradient.

    Raises:
        ValueError: on shapes that do not fit.
    """
    check_shapes(tokens=(tokens, "C M D"), patches=(patches, "B N D"))
    with torch.no_grad(), full_precision(tokens.device):
        tokens, shape = unit_rows(tokens), (*tokens.shape[:2], patches.shape[1])
        patches = unit_rows(patches)
        return (by_image(tokens, len(patches)) @ patches.transpose(1, 2)).view(shape)


def match_patches(tokens: Tensor, patches: Tensor) -> Tensor:
    """Equation (2) for the positive pairs: each token's patch of the highest cosine similarity.

    Arguments and errors are those of `patch_similarities`.

    Returns:
        int64 [C, M]. The index has no gradient, so this alone never trains g. Ties go to the lowest
        index.
    """
    return patch_similarities(tokens, patches).argmax(2)


def chosen_features(patches: Tensor, match: Tensor) -> Tensor:
    """The features of each token's patch, by `match_patches`: [B, N, H], [C, M] -> [C, M, H]."""
    chosen = by_image(match, len(patches))[:, :, None].expand(-1, -1, patches.shape[2])
    return patches.gather(1, chosen).view(*match.shape, patches.shape[2])


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
    student_patches: Tensor,
    teacher_patches: Tensor,
    reduction: str = "mean",
    patch_mask: Tensor | None = None,
) -> Tensor:
    """Equation (7): each patch regresses the teacher's at the same place; both are [B, N, H].

    `patch_mask`: bool [B, N], the patches that the mean of each image is over; None: all.
    """
    check_shapes(
        student_patches=(student_patches, "B N H"), teacher_patches=(teacher_patches, "B N H")
    )
    distances = squared_distance(student_patches, teacher_patches, reduction)  # [B, N]
    if patch_mask is None:
        return distances.mean()
    return masked_mean(distances, patch_mask)


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
        student_tokens: [C, M, H].
        teacher_patches: [B, N, H], the frozen teacher's, already layer-normalised.
        match: of `match_patches`, int64 [C, M].
        token_mask: bool [C, M], True = valid (not [CLS], [SEP], [PAD]).
        reduction: "mean" or "sum" over H, see `squared_distance`.

    Raises:
        ValueError: on shapes that do not fit.
    """
    check_shapes(
        student_tokens=(student_tokens, "C M H"),
        teacher_patches=(teacher_patches, "B N H"),
        match=(match, "C M"),
        token_mask=(token_mask, "C M"),
    )
    targets = chosen_features(teacher_patches, match)  # [C, M, H]
    return masked_mean(squared_distance(student_tokens, targets, reduction), token_mask)


def cls_distillation_loss(
    student_image: Tensor, student_text: Tensor, teacher_image: Tensor, reduction: str = "mean"
) -> Tensor:
    """Both class tokens regress the teacher's, the document's starting point: mean of both.

    Of images [B, H], of texts [C, H].

    Raises ValueError on shapes that do not fit.
    """
    check_shapes(
        student_image=(student_image, "B H"),
        student_text=(student_text, "C H"),
        teacher_image=(teacher_image, "B H"),
    )
    image = squared_distance(student_image, teacher_image, reduction).mean()
    texts = by_image(student_text[:, None], len(teacher_image))  # [B, K, H]
    text = squared_distance(texts, teacher_image[:, None], reduction).mean()
    return (image + text) / 2
