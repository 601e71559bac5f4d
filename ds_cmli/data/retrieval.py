"""Recall at 1, 5 and 10 where a picture may have several captions and scores may be equal.

Shapes: n captions, m pictures, r of them on this rank.
"""

import torch
from torch import Tensor

from ds_cmli.distributed.process_group import sum_over_ranks

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


def chance(image_of: Tensor) -> dict[str, float]:
    """What scores that say nothing reach: `chance/i2t_r1` ... ; int64 [n], each caption's picture."""
    own = image_of.unique(return_counts=True)[1].double()  # [m], captions of each picture
    one, none = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    by_way = {
        "i2t": lambda k: expected_hits(torch.zeros_like(own), len(image_of) - own, own, k),
        "t2i": lambda k: expected_hits(none, none + len(own) - 1, one, k),
    }
    return {f"chance/{way}_r{k}": by_way[way](k).mean().item() for way in WAYS for k in RECALLS}


def recall(i2t: Tensor, t2i: Tensor, own: Tensor, image_of: Tensor) -> dict[str, float]:
    """Recall of any of a picture's captions, and of a caption's picture among all pictures.

    Args:
        i2t, t2i: fp32 [r, n], scores of this rank's r pictures with all n captions, from either side.
        own: int64 [r], the numbers of these pictures; every picture is on one rank.
        image_of: int64 [n], the number of each caption's picture.

    Returns:
        `i2t_r1` ... `t2i_r10`, fractions of all pictures and of all captions, the same on every rank. Among equal
        scores the order is random, and the value its mean: constant scores give `chance`. What is no number loses to
        everything and everything wins against it. Collective.
    """
    n = len(image_of)
    mine = own[:, None] == image_of  # [r, n]
    # i2t: the competitors stand in the row itself.
    best = i2t.masked_fill(~mine, -torch.inf).amax(1, keepdim=True)  # [r, 1]
    tied = i2t == best
    counts = [~(i2t <= best) & ~mine, tied & ~mine, tied & mine]
    above, same, right = (x.sum(1).double() for x in counts)  # [r] each
    hits = [expected_hits(above, same, right, k).sum() for k in RECALLS]
    # t2i: the competitors stand in a column, spread over ranks.
    row, caption = mine.nonzero(as_tuple=True)
    score = torch.zeros(n, dtype=t2i.dtype).index_put_((caption,), t2i[row, caption])  # each is set on one rank
    score = sum_over_ranks(score)  # collective
    columns = torch.stack([(~(t2i <= score) & ~mine).sum(0), (t2i == score).logical_and(~mine).sum(0)])  # [2, n]
    above, same = sum_over_ranks(columns.double())  # collective
    found = torch.stack([*hits, torch.tensor(len(own)).double()])
    found = sum_over_ranks(found)  # collective
    values = {f"i2t_r{k}": (hit / found[-1]).item() for k, hit in zip(RECALLS, found, strict=False)}
    right = (~score.isnan()).double()
    return values | {f"t2i_r{k}": expected_hits(above, same, right, k).mean().item() for k in RECALLS}
