"""Recall at 1, 5 and 10 for pictures with several captions, with an exact treatment of tied scores.

Shapes: K kinds of scores, n captions, m pictures; a block has r of the pictures and b of the captions.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

RECALLS = (1, 5, 10)
WAYS = ("i2t", "t2i")


def expected_hits(above: Tensor, tied: Tensor, own: Tensor, k: int) -> Tensor:
    """The probability that one of the best right candidates is among the first k, if ties are ordered at random.

    Args:
        above: number of wrong candidates with a higher score; float64 of any shape.
        tied: number of wrong candidates with an equal score.
        own: number of right candidates with that score; 0 if it is NaN, which is no hit.
    """
    miss = torch.ones_like(above)
    for i in range(k):  # the places after `above` go one by one to tied candidates, drawn at random
        drawn = (tied - i).clamp(min=0) / (tied + own - i).clamp(min=1)
        miss = torch.where(above + i < k, miss * drawn, miss)
    return torch.where(own > 0, 1 - miss, 0.0)


@dataclass
class Competitors:
    """For each query, counts of candidates by comparison with its best right candidate.

    `i2t` is float64 [K, m, 3] and `t2i` float64 [K, n, 3]: the numbers of wrong candidates with a higher score, of
    wrong candidates with an equal score, and of right candidates with that score.
    """

    i2t: Tensor
    t2i: Tensor

    @classmethod
    def none(cls, scores: int, pictures: int, captions: int) -> "Competitors":
        return cls(
            *(torch.zeros(scores, count, 3, dtype=torch.float64) for count in (pictures, captions))
        )

    def add(
        self, i2t: Tensor, t2i: Tensor, rows: Tensor, columns: Tensor, mine: Tensor, best: Tensor, own: Tensor,
        compared: Tensor | None = None,
    ) -> None:  # fmt: skip
        """Count the competitors in one block of the score matrix.

        Args:
            i2t, t2i: [K, r, b], scores of pictures with captions, from the picture's and from the caption's side.
            rows, columns: int64 [r] and [b], the numbers of these pictures and captions.
            mine: bool [r, b], whether the caption is one of the picture's.
            best: [K, r], the highest i2t score of each picture with one of its own captions.
            own: [K, b], the t2i score of each caption with its own picture.
            compared: bool [r, b], the wrong pairs that count; None: all.

        NaN never helps: a wrong candidate with NaN counts as higher, as does any wrong one if the right one has NaN.
        """
        wrong = ~mine if compared is None else ~mine & compared
        for scores, right, axis, counts, places in (
            (i2t, best[:, :, None], 2, self.i2t, rows),
            (t2i, own[:, None, :], 1, self.t2i, columns),
        ):
            equal = scores == right
            found = [
                (~(scores <= right) & wrong).sum(axis),
                (equal & wrong).sum(axis),
                (equal & mine).sum(axis),
            ]
            counts.index_add_(1, places, torch.stack(found, 2).double().cpu())  # CPU-GPU sync

    def recalls(self, pictures: Tensor, captions: Tensor) -> list[dict[str, float]]:
        """`i2t_r1` ... `t2i_r10` and their mean `mean_recall`, for each of the K kinds of scores.

        Args:
            pictures, captions: int64, the numbers of the queries over which the mean is taken.
        """
        out = []
        for i2t, t2i in zip(self.i2t[:, pictures], self.t2i[:, captions], strict=True):
            values = {
                f"{way}_r{k}": expected_hits(x[:, 0], x[:, 1], x[:, 2], k).mean().item()
                for way, x in (("i2t", i2t), ("t2i", t2i))
                for k in RECALLS
            }
            out.append({**values, "mean_recall": sum(values.values()) / len(values)})
        return out


def chance(image_of: Tensor) -> dict[str, float]:
    """The recalls of uninformative scores, `chance/i2t_r1` ...; `image_of`: int64 [n], each caption's picture."""
    own = image_of.unique(return_counts=True)[1].double()  # [m], captions of each picture
    one, none = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    by_way = {
        "i2t": lambda k: expected_hits(torch.zeros_like(own), len(image_of) - own, own, k),
        "t2i": lambda k: expected_hits(none, none + len(own) - 1, one, k),
    }
    values = {f"chance/{way}_r{k}": by_way[way](k).mean().item() for way in WAYS for k in RECALLS}
    return values | {"chance/mean_recall": sum(values.values()) / len(values)}


def own_scores(i2t: Tensor, t2i: Tensor, mine: Tensor) -> tuple[Tensor, Tensor]:
    """The scores of the right candidates in a block that holds the picture of each of its captions.

    Args:
        i2t, t2i: [K, r, b].
        mine: bool [r, b], True for each caption's only picture.

    Returns:
        [K, r], the highest i2t score of each picture with one of its captions in the block, minus infinity if the block
        has none of them; and [K, b], the t2i score of each caption with its own picture.
    """
    best = i2t.masked_fill(~mine, -torch.inf).amax(2)
    return best, t2i.gather(1, mine.int().argmax(0).expand(len(t2i), 1, -1))[:, 0]


def recall(i2t: Tensor, t2i: Tensor, image_of: Tensor) -> dict[str, float]:
    """Recall from whole score matrices: of any of a picture's captions, and of a caption's picture.

    Args:
        i2t, t2i: [m, n], scores of all pictures with all captions, from the picture's and from the caption's side.
        image_of: int64 [n], the row of each caption's picture; each picture has a caption.

    Returns:
        `i2t_r1` ... `t2i_r10`, as fractions of all pictures or all captions, and their mean. Values are expectations
        over a random order of tied candidates: constant scores give `chance`.
    """
    pictures, captions = torch.arange(len(i2t)), torch.arange(len(image_of))
    mine = pictures[:, None] == image_of
    best, own = own_scores(i2t[None], t2i[None], mine)
    counts = Competitors.none(1, *i2t.shape)
    counts.add(i2t[None], t2i[None], pictures, captions, mine, best, own)
    return counts.recalls(pictures, captions)[0]
