"""The metrics of evaluations as functions of tensors, on the CPU or a GPU.

These are the recall of retrieval, hits of the pointing game and the accuracy of classification.

Shapes: K kinds of scores (global, cmli, combined), n captions, m pictures; a block has r of the
pictures and b of the captions; B pictures of a batch, C classes; N = rows * columns patches, M
tokens of a caption, F phrases in it, D embedding dimension.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ds_cmli.common.errors import UserError
from ds_cmli.data.images import PixelBox
from ds_cmli.evaluate.report import prefixed
from ds_cmli.losses.target_cmli import match_patches

RECALLS = (1, 5, 10)
TOP = (1, 5)


def expected_hits(above: Tensor, tied: Tensor, positive: Tensor, k: int) -> Tensor:
    """The probability that one of the best positives is among the first k, if ties are random.

    Args:
        above: number of negatives with a higher score; float64 of any shape.
        tied: number of negatives with an equal score.
        positive: number of positives with that score; 0 if it is NaN, which is no hit.
    """
    miss = torch.ones_like(above)
    for i in range(k):  # the places after `above` go one by one to tied candidates, drawn at random
        drawn = (tied - i).clamp(min=0) / (tied + positive - i).clamp(min=1)
        miss = torch.where(above + i < k, miss * drawn, miss)
    return torch.where(positive > 0, 1 - miss, 0.0)


@dataclass
class ScoreBlock:
    """A block of the score matrix."""

    pictures: Tensor  # int64 [r], their numbers
    captions: Tensor  # int64 [b]
    i2t: Tensor  # [K, r, b], scores from the picture's side
    t2i: Tensor  # [K, r, b], scores from the caption's side
    is_positive: Tensor  # bool [r, b], whether the caption is one of the picture's

    def positive_scores(self) -> tuple[Tensor, Tensor]:
        """The scores of the positive pairs; the block has the picture of each of its captions.

        Returns:
            [K, r], the highest i2t score of each picture with one of its captions in the block,
            minus infinity if the block has none of them; and [K, b], the t2i score of each caption
            with its picture.
        """
        best = self.i2t.masked_fill(~self.is_positive, -torch.inf).amax(2)
        row = self.is_positive.int().argmax(0).expand(len(self.t2i), 1, -1)
        return best, self.t2i.gather(1, row)[:, 0]


@dataclass
class RankCounts:
    """Counts of candidates by comparison with each query's best positive.

    `i2t` is float64 [K, m, 3] and `t2i` float64 [K, n, 3]: the numbers of negatives with a higher
    score, of negatives with an equal score, and of positives with that score.
    """

    i2t: Tensor
    t2i: Tensor

    @classmethod
    def zeros(cls, scores: int, pictures: int, captions: int) -> "RankCounts":
        i2t = torch.zeros(scores, pictures, 3, dtype=torch.float64)
        return cls(i2t, torch.zeros(scores, captions, 3, dtype=torch.float64))

    def add(
        self,
        block: ScoreBlock,
        best_positive: Tensor,
        positive: Tensor,
        compared: Tensor | None = None,
    ) -> None:
        """Count the candidates in one block of the score matrix.

        Args:
            best_positive: [K, r], the highest i2t score of each picture with one of its captions.
            positive: [K, b], the t2i score of each caption with its picture.
            compared: bool [r, b], the negative pairs that count; None: all.

        NaN never helps: a negative with NaN counts as higher, as does any if the positive has NaN.
        """
        negative = ~block.is_positive
        if compared is not None:
            negative &= compared
        for scores, best, axis, counts, queries in (
            (block.i2t, best_positive[:, :, None], 2, self.i2t, block.pictures),
            (block.t2i, positive[:, None, :], 1, self.t2i, block.captions),
        ):
            equal = scores == best
            above = (~(scores <= best) & negative).sum(axis)
            tied = (equal & negative).sum(axis)
            positives = (equal & block.is_positive).sum(axis)
            columns = torch.stack([above, tied, positives], 2)
            counts.index_add_(1, queries, columns.double().cpu())  # CPU-GPU sync

    def recalls(self, pictures: Tensor, captions: Tensor) -> list[dict[str, float]]:
        """`i2t_r1` ... `t2i_r10` and their mean `mean_recall`, for each of the K kinds of scores.

        Args:
            pictures, captions: int64, the numbers of the queries over which the mean is taken.
        """
        out = []
        for i2t, t2i in zip(self.i2t[:, pictures], self.t2i[:, captions], strict=True):
            out.append(_recalls({"i2t": i2t, "t2i": t2i}))
        return out


def _recalls(counts: dict[str, Tensor]) -> dict[str, float]:
    """The recalls of each way and their mean, from counts [queries, 3] as in `RankCounts`."""
    values = {}
    for way, count in counts.items():
        above, tied, positive = count.unbind(1)
        for k in RECALLS:
            values[f"{way}_r{k}"] = expected_hits(above, tied, positive, k).mean().item()
    return {**values, "mean_recall": sum(values.values()) / len(values)}


def recalls(i2t: Tensor, t2i: Tensor, image_of: Tensor) -> dict[str, float]:
    """Recall at 1, 5 and 10 both ways, `i2t_r1` ... `t2i_r10`, and their mean, `mean_recall`.

    An image finds any of its captions. Ties get the expected random rank, and NaN never helps.

    Args:
        i2t, t2i: floating point [I, J] of the same shape, in which a row is an image's in both, as
            `inference.Model.scores` gives them: captions are ranked for an image by `i2t`, images
            for a caption by `t2i`. For scores that are equal both ways give them twice.
        image_of: int64 [J], the row of each caption's image. Images without a caption are
            candidates alone.

    Raises:
        UserError: the shapes do not fit, or a caption's image is none of the rows.
    """
    if i2t.ndim != 2 or i2t.shape != t2i.shape or image_of.shape != i2t.shape[1:]:
        shapes = ", ".join(str([*x.shape]) for x in (i2t, t2i, image_of))
        raise UserError(f"i2t, t2i and image_of are {shapes}: give [I, J], [I, J] and [J]")
    if not len(image_of) or not 0 <= int(image_of.min()) <= int(image_of.max()) < len(i2t):
        raise UserError(f"image_of is {image_of}: give each caption a row, 0 to {len(i2t) - 1}")
    pictures, captions = torch.arange(len(i2t)), torch.arange(len(image_of))
    image_of = image_of.cpu()
    is_positive = (pictures[:, None] == image_of).to(i2t.device)
    block = ScoreBlock(pictures, captions, i2t[None], t2i[None], is_positive)
    counts = RankCounts.zeros(1, *i2t.shape)
    counts.add(block, *block.positive_scores())
    return counts.recalls(image_of.unique(), captions)[0]


def chance(image_of: Tensor) -> dict[str, float]:
    """The recalls of uninformative scores, `chance/i2t_r1` ...

    `image_of`: int64 [n], each caption's picture.
    """
    captions = image_of.unique(return_counts=True)[1].double()  # [m], of each picture
    none = torch.zeros_like(captions)
    i2t = torch.stack([none, len(image_of) - captions, captions], 1)
    t2i = torch.tensor([[0, len(captions) - 1, 1]], dtype=torch.float64)
    return prefixed("chance/", _recalls({"i2t": i2t, "t2i": t2i}))


def pictures_of_patches(cells: Tensor, grid: tuple[int, int]) -> Tensor:
    """The picture in which each patch of scenes lies, -1 for none: int64 [B, 2, 2] -> [B, N]."""
    shown = F.interpolate(cells[:, None].float(), size=grid, mode="nearest")
    return shown.flatten(1).long()


def scene_hits(
    patches: Tensor, tokens: Tensor, token_picture: Tensor, cells: Tensor, grid: tuple[int, int]
) -> Tensor:
    """Count the hits of one scene.

    Args:
        patches, tokens: [N, D], [M, D].
        token_picture: int64 [M], the picture that each token names, -1 for none.
        cells: int64 [2, 2], the picture in each quarter, -1 for none.
        grid: numbers of rows and columns of patches.

    Returns:
        fp64 [2]: the number of tokens whose best patch lies in their own picture, and of all tokens
        with a picture.
    """
    match = match_patches(tokens[None], patches[None])[0]  # [M]
    pictures = pictures_of_patches(cells[None], grid)[0][match]  # [M]
    counted = token_picture >= 0
    return torch.stack([((pictures == token_picture) & counted).sum(), counted.sum()]).double()


def phrase_hits(patches: Tensor, tokens: Tensor, phrase: Tensor, inside: Tensor) -> Tensor:
    """Whether the patch with the highest mean similarity to a phrase's tokens lies inside: [F].

    Args:
        patches, tokens: [N, D], [M, D], of unit length.
        phrase: int64 [M], the phrase of each token, -1 for none. A phrase without a token is no
            hit.
        inside: bool [F, N], the patches whose centre lies in a box of the phrase.
    """
    similarity = tokens.float() @ patches.float().t()  # [M, N]
    of_phrase = phrase == torch.arange(len(inside))[:, None]  # [F, M]
    mean = of_phrase.float() @ similarity / of_phrase.sum(1, keepdim=True).clamp(min=1)  # [F, N]
    return inside.gather(1, mean.argmax(1, keepdim=True))[:, 0] & of_phrase.any(1)


def patches_inside(boxes: list[PixelBox], view: PixelBox, grid: tuple[int, int]) -> Tensor:
    """Whether the centre of each patch lies in one of the boxes, borders included: bool [N].

    Args:
        boxes: in pixels of the original picture.
        view: the part of the picture that the model sees, in the same pixels.
        grid: numbers of rows and columns of patches into which the view is divided.
    """
    left, top, right, bottom = view
    rows, columns = grid
    y = top + (torch.arange(rows).double() + 0.5) * (bottom - top) / rows
    x = left + (torch.arange(columns).double() + 0.5) * (right - left) / columns
    inside = torch.zeros(rows, columns, dtype=torch.bool)
    for x0, y0, x1, y1 in boxes:
        inside |= ((y >= y0) & (y <= y1))[:, None] & ((x >= x0) & (x <= x1))
    return inside.flatten()


def top_hits(scores: Tensor, target: Tensor) -> Tensor:
    """Whether the right class is among the first k, for each k of `TOP`: fp64 [len(TOP), K, B].

    If scores are tied, it is a probability.

    Args:
        scores: [K, B, C]; a right class with NaN is no hit, and a wrong class with NaN counts as
            higher.
        target: int64 [B], the right classes.
    """
    right = scores.gather(2, target.expand(len(scores), -1)[:, :, None])  # [K, B, 1]
    above = (~(scores <= right)).sum(2).double()
    equal = (scores == right).sum(2).double()  # includes the right class, unless it is NaN
    tied, positive = (equal - 1).clamp(min=0), equal.clamp(max=1)
    return torch.stack([expected_hits(above, tied, positive, k) for k in TOP])


def top_chances(classes: int) -> dict[str, float]:
    """The accuracies of uninformative scores, `chance/top1` ..."""
    return {f"chance/top{n}": min(1.0, n / classes) for n in TOP}


def accuracies(scores: Tensor, target: Tensor) -> dict[str, float]:
    """The share of right classes, as `accuracies_by_class` gives it.

    Args:
        scores: floating point [I, C] of I pictures; ties get the expected random rank.
        target: int64 [I], the right classes.
    """
    hits = torch.zeros(len(TOP), scores.shape[1], dtype=torch.float64)
    hits.index_add_(1, target.cpu(), top_hits(scores[None], target)[:, 0].cpu())
    return accuracies_by_class(hits, target.cpu().bincount(minlength=scores.shape[1]))


def accuracies_by_class(hits: Tensor, counts: Tensor) -> dict[str, float]:
    """`top1`, `top5`, and `mean_per_class`, top 1 averaged over the classes that have pictures.

    Args:
        hits: fp64 [len(TOP), C], the sum of `top_hits` over each class's pictures.
        counts: [C], the number of each class's pictures.
    """
    shown = counts > 0
    out = {}
    for n, of_class in zip(TOP, hits, strict=True):
        out[f"top{n}"] = (of_class.sum() / counts.sum()).item()
    return {**out, "mean_per_class": (hits[0, shown] / counts[shown]).mean().item()}
