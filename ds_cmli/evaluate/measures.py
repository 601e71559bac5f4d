"""The measures of evaluations, as functions of tensors.

K kinds of scores, I images, J captions, C classes; N patches, M tokens, F phrases of a caption, D
embedding dimension.
"""

import torch
from torch import Tensor

RECALLS = (1, 5, 10)
TOP = (1, 5)


def expected_hits(counts: Tensor, k: int) -> Tensor:
    """Return the probability that a right one is among the first k, by `count_candidates`."""
    above, tied, right = counts.unbind(-1)
    miss = torch.ones_like(above)
    # The places after `above` go one by one to tied candidates, drawn at random.
    for place in range(k):
        drawn = (tied - place).clamp(min=0) / (tied + right - place).clamp(min=1)
        miss = torch.where(above + place < k, miss * drawn, miss)
    return torch.where(right > 0, 1 - miss, 0.0)


def count_candidates(scores: Tensor, best: Tensor, is_right: Tensor, axis: int) -> Tensor:
    """Compare the candidates along an axis with each query's best right candidate.

    `scores` are [K, I, J], `is_right` [I, J]. `axis`: 2 if captions are candidates for an image, 1
    if images are candidates for a caption. `best`: the right one's score, of size 1 along the axis.

    Returns float64 [K, queries, 3]: the wrong candidates above it, among which NaN counts, the
    wrong ones equal to it, and the right ones equal to it.
    """
    equal = scores == best
    above = (~(scores <= best) & ~is_right).sum(axis)
    tied = (equal & ~is_right).sum(axis)
    right = (equal & is_right).sum(axis)
    return torch.stack([above, tied, right], -1).double()


def best_of_right_pairs(i2t: Tensor, t2i: Tensor, is_right: Tensor) -> tuple[Tensor, Tensor]:
    """Return the score of each query's best right candidate, from [K, I, J] twice, bool [I, J].

    First each image's with a caption of its own, minus infinity without any, [K, I, 1]; then each
    caption's with its image, [K, 1, J]. Every caption's image must be among the images.
    """
    best_captions = i2t.masked_fill(~is_right, -torch.inf).amax(2, keepdim=True)
    own_image = is_right.int().argmax(0)  # [J]
    return best_captions, t2i.gather(1, own_image.expand(len(t2i), 1, -1))


def mean_recalls(i2t_counts: Tensor, t2i_counts: Tensor) -> dict[str, float]:
    """Return `i2t_r1` ... `t2i_r10` and their mean, from counts [queries, 3] in each direction."""
    values: dict[str, float] = {}
    for direction, counts in (("i2t", i2t_counts), ("t2i", t2i_counts)):
        for k in RECALLS:
            values[f"{direction}_r{k}"] = expected_hits(counts, k).mean().item()
    return {**values, "mean_recall": sum(values.values()) / len(values)}


def recalls(i2t: Tensor, t2i: Tensor, image_of: Tensor) -> dict[str, float]:
    """Return recall at 1, 5 and 10 in both directions, `i2t_r1` ... `t2i_r10`, and `mean_recall`.

    Captions are ranked by a row of `i2t`, [I, J], images by a column of `t2i`, [I, J]. `image_of`,
    int64 [J], is each caption's image. Ties get the expected random rank, and NaN never helps.
    """
    is_right = torch.arange(len(i2t), device=i2t.device)[:, None] == image_of.to(i2t.device)
    best_captions, best_images = best_of_right_pairs(i2t[None], t2i[None], is_right)
    (i2t_counts,) = count_candidates(i2t[None], best_captions, is_right, 2)
    (t2i_counts,) = count_candidates(t2i[None], best_images, is_right, 1)
    return mean_recalls(i2t_counts[image_of.unique()], t2i_counts)


def chance_recalls(image_of: Tensor) -> dict[str, float]:
    """Return the recalls of uninformative scores. `image_of`: int64 [J], each caption's image."""
    _, captions = image_of.unique(return_counts=True)
    captions = captions.double()  # [I], the number of each image's captions
    none_above = torch.zeros_like(captions)
    i2t_counts = torch.stack([none_above, len(image_of) - captions, captions], 1)
    t2i_counts = torch.tensor([[0.0, len(captions) - 1, 1]], dtype=torch.float64)
    return mean_recalls(i2t_counts, t2i_counts)


def top_hits(scores: Tensor, target: Tensor) -> Tensor:
    """Return how probably the right class is among the first of `TOP`.

    [K, I, C], int64 [I] -> [2, K, I].
    """
    is_right = torch.arange(scores.shape[2], device=scores.device) == target[:, None]  # [I, C]
    right_scores = scores.gather(2, target.expand(len(scores), -1)[:, :, None])
    counts = count_candidates(scores, right_scores, is_right, 2)
    return torch.stack([expected_hits(counts, k) for k in TOP])


def accuracies(scores: Tensor, target: Tensor) -> dict[str, float]:
    """Return `mean_accuracies` of scores [I, C] and right classes, int64 [I]."""
    return mean_accuracies(top_hits(scores[None], target)[:, 0], target)


def mean_accuracies(hits: Tensor, target: Tensor) -> dict[str, float]:
    """Return `top1`, `top5` and `mean_per_class`, of hits [2, I] and right classes, int64 [I].

    The last is the mean of top 1 over the classes that have images.
    """
    means = {f"top{k}": row.mean().item() for k, row in zip(TOP, hits, strict=True)}
    images_of_class = target.bincount()
    hits_of_class = target.bincount(hits[0])
    top1_of_class = (hits_of_class / images_of_class)[images_of_class > 0]
    return {**means, "mean_per_class": top1_of_class.mean().item()}


def phrase_hits(patches: Tensor, tokens: Tensor, phrase: Tensor, shown: Tensor) -> Tensor:
    """Return True for each phrase whose best patch lies on what it names: bool [F].

    The best patch, of [N, D], has the highest mean similarity to the phrase's tokens, of [M, D],
    all of unit length. `phrase` is each token's, int64 [M], -1 for none. `shown`, bool [F, N], are
    the patches that show what the phrase names. A phrase without a token is no hit.
    """
    similarity = tokens.float() @ patches.float().t()  # [M, N]
    is_token_of = phrase == torch.arange(len(shown))[:, None]  # [F, M]
    num_tokens = is_token_of.sum(1, keepdim=True).clamp(min=1)
    mean = is_token_of.float() @ similarity / num_tokens  # [F, N]
    hit = shown.gather(1, mean.argmax(1, keepdim=True))[:, 0]
    return hit & is_token_of.any(1)


def patches_inside(boxes: list, view: tuple, grid: tuple[int, int]) -> Tensor:
    """Return True for each patch whose centre lies in one of the boxes, borders included: bool [N].

    `boxes` and `view`, which the grid of rows and columns divides, are left, top, right, bottom.
    """
    left, top, right, bottom = view
    rows, columns = grid
    y = top + (torch.arange(rows).double() + 0.5) * (bottom - top) / rows
    x = left + (torch.arange(columns).double() + 0.5) * (right - left) / columns
    is_inside = torch.zeros(rows, columns, dtype=torch.bool)
    for x0, y0, x1, y1 in boxes:
        is_inside |= ((y >= y0) & (y <= y1))[:, None] & ((x >= x0) & (x <= x1))
    return is_inside.flatten()
