"""Recall at 1, 5 and 10 where a picture may have several captions and scores may be equal.

Shapes: K scores side by side, n captions, m pictures; a block has r of the pictures and b of the captions.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

RECALLS = (1, 5, 10)
WAYS = ("i2t", "t2i")


def expected_hits(above: Tensor, tied: Tensor, own: Tensor, k: int) -> Tensor:
    """The chance that one of `own` equal candidates is among the first k, in a random order of equal scores.

    Args:
        above: competitors that score more, `tied`: as much; float64 of any shape.
        own: right candidates with that score; 0, where the score is no number: no hit.
    """
    miss = torch.ones_like(above)
    for i in range(k):  # one place after the other goes to an equal one, drawn at random
        drawn = (tied - i).clamp(min=0) / (tied + own - i).clamp(min=1)
        miss = torch.where(above + i < k, miss * drawn, miss)
    return torch.where(own > 0, 1 - miss, 0.0)


@dataclass
class Competitors:
    """For each query how many wrong candidates score more than its best right one, or as much; float64 each.

    `i2t` is [K, m, 3] and `t2i` [K, n, 3]: above, tied, and right candidates with the best score.
    """

    i2t: Tensor
    t2i: Tensor

    @classmethod
    def none(cls, scores: int, pictures: int, captions: int) -> "Competitors":
        return cls(*(torch.zeros(scores, count, 3, dtype=torch.float64) for count in (pictures, captions)))

    def add(
        self, i2t: Tensor, t2i: Tensor, rows: Tensor, columns: Tensor, mine: Tensor, best: Tensor, own: Tensor,
        compared: Tensor | None = None,
    ) -> None:  # fmt: skip
        """Count the competitors in one block of the score matrix.

        Args:
            i2t, t2i: [K, r, b], scores of pictures with captions, from either side.
            rows, columns: int64 [r] and [b], the numbers of these pictures and captions.
            mine: bool [r, b], the caption is one of the picture's.
            best: [K, r], the highest i2t score of each picture with one of its own captions.
            own: [K, b], the t2i score of each caption with its own picture.
            compared: bool [r, b], the pairs that count; None: all.

        What is no number loses to everything, and everything wins against it.
        """
        wrong = ~mine if compared is None else ~mine & compared
        for scores, right, axis, counts, places in (
            (i2t, best[:, :, None], 2, self.i2t, rows),
            (t2i, own[:, None, :], 1, self.t2i, columns),
        ):
            equal = scores == right
            found = [(~(scores <= right) & wrong).sum(axis), (equal & wrong).sum(axis), (equal & mine).sum(axis)]
            counts.index_add_(1, places, torch.stack(found, 2).double().cpu())  # CPU-GPU sync

    def recalls(self, pictures: Tensor, captions: Tensor) -> list[dict[str, float]]:
        """`i2t_r1` ... `t2i_r10` and their mean `mean_recall`, of each of the K scores.

        Args:
            pictures, captions: int64, the numbers of those that are asked.
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
    """What scores that say nothing reach: `chance/i2t_r1` ... ; int64 [n], each caption's picture."""
    own = image_of.unique(return_counts=True)[1].double()  # [m], captions of each picture
    one, none = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    by_way = {
        "i2t": lambda k: expected_hits(torch.zeros_like(own), len(image_of) - own, own, k),
        "t2i": lambda k: expected_hits(none, none + len(own) - 1, one, k),
    }
    values = {f"chance/{way}_r{k}": by_way[way](k).mean().item() for way in WAYS for k in RECALLS}
    return values | {"chance/mean_recall": sum(values.values()) / len(values)}


def own_scores(i2t: Tensor, t2i: Tensor, mine: Tensor) -> tuple[Tensor, Tensor]:
    """The right candidates' scores in a block that holds the picture of each of its captions.

    Args:
        i2t, t2i: [K, r, b].
        mine: bool [r, b], each caption's only picture.

    Returns:
        [K, r], the highest i2t score of each picture with one of its captions in the block, minus infinity where there
        is none, and [K, b], the t2i score of each caption with its own picture.
    """
    best = i2t.masked_fill(~mine, -torch.inf).amax(2)
    return best, t2i.gather(1, mine.int().argmax(0).expand(len(t2i), 1, -1))[:, 0]


def recall(i2t: Tensor, t2i: Tensor, image_of: Tensor) -> dict[str, float]:
    """Recall of any of a picture's captions, and of a caption's picture among all pictures, of whole score matrices.

    Args:
        i2t, t2i: [m, n], scores of all pictures with all captions, from either side.
        image_of: int64 [n], the row of each caption's picture; each picture has a caption.

    Returns:
        `i2t_r1` ... `t2i_r10`, fractions of all pictures and of all captions, and their mean. Among equal scores the
        order is random, and the value its mean: constant scores give `chance`.
    """
    pictures, captions = torch.arange(len(i2t)), torch.arange(len(image_of))
    mine = pictures[:, None] == image_of
    best, own = own_scores(i2t[None], t2i[None], mine)
    counts = Competitors.none(1, *i2t.shape)
    counts.add(i2t[None], t2i[None], pictures, captions, mine, best, own)
    return counts.recalls(pictures, captions)[0]
