"""Recall at 1, 5 and 10 for pictures with several captions, with an exact treatment of tied scores.

Shapes: K kinds of scores, n captions, m pictures; a block has r of the pictures and b of the captions.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from ds_cmli.cmli import cmli_scores
from ds_cmli.cmli.pair_scores import both_ways
from ds_cmli.distributed import process_group as distributed
from ds_cmli.evaluate.embed import Images, Texts

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


PICTURES = 128  # pictures per block
CAPTIONS = 512  # captions per block, at most


def names(scales: dict[str, float]) -> list[str]:
    """The kinds of scores to evaluate, given 1/temperature of the kinds that the model's losses compare."""
    return ["global", "cmli", "combined"] if "cmli" in scales else ["global"]


def pair_scores(
    image_cls: Tensor,
    patches: Tensor,
    text_cls: Tensor,
    tokens: Tensor,
    token_mask: Tensor,
    scales: dict[str, float],
) -> tuple[Tensor, Tensor]:
    """Scores of all pictures with all captions of a block: fp32 [K, r, b] from the picture's and the caption's side.

    Args:
        image_cls, text_cls: fp32 [r, H], [b, H].
        patches, tokens, token_mask: [r, N, D], [b, M, D], bool [b, M].
    """
    by_global = image_cls @ text_cls.t()
    if "cmli" not in scales:
        return by_global[None], by_global[None]
    found = both_ways(by_global, cmli_scores(patches, tokens, token_mask), scales)
    i2t, t2i = zip(*(found[name] for name in names(scales)), strict=True)
    return torch.stack(i2t), torch.stack(t2i)


def competitors(
    images: Images,
    texts: Texts,
    image_of: Tensor,
    scales: dict[str, float],
    device: Any,
    fold_of: Tensor | None = None,
    heartbeat: Callable[[], None] = lambda: None,
) -> tuple[Competitors, Competitors | None]:
    """Count the competitors of the right candidates over the pictures and captions of all ranks.

    Args:
        images, texts: this rank's own pictures, and exactly their captions.
        image_of: int64 [n], each caption's picture.
        fold_of: int64 [m], the fold of each picture.
        heartbeat: called for every block, as often on every rank.

    Returns:
        The counts over all pairs, and with `fold_of` those within folds; the same on every rank.

    Collective.
    """
    place = torch.full(
        (int(image_of.max()) + 1,), -1
    )  # [m], each picture's row in `images`, -1 if it has none
    place[images.number] = torch.arange(len(images.number))
    blocks = [slice(start, start + PICTURES) for start in range(0, len(images.number), PICTURES)]
    own = list(_caption_blocks(place[image_of[texts.number]]))
    plan = distributed.gather_objects((len(blocks), len(own)))  # collective
    most_blocks = max(count for count, _ in plan)

    def scored(rows: slice, text: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        cls, tokens, mask = (x.to(device) for x in text)
        return pair_scores(*images.block(rows, device), cls, tokens, mask, scales)

    def mine(rows: slice, captions: Tensor) -> Tensor:
        return images.number[rows, None] == image_of[captions]

    # First the right pairs, which lie in the blocks on the diagonal. They are computed in the same way as again below,
    # so that a score is bitwise equal to itself.
    best = torch.full(
        (len(names(scales)), len(images.number)), -torch.inf
    )  # [K, pictures of this rank]
    right = []  # [K, b] for each of this rank's blocks of captions
    for number in range(max(count for _, count in plan)):
        heartbeat()
        if number < len(own):
            block, columns = own[number]
            i2t, t2i = (
                x.cpu() for x in scored(blocks[block], texts.block(columns))
            )  # CPU-GPU sync
            found, of_captions = own_scores(i2t, t2i, mine(blocks[block], texts.number[columns]))
            best[:, blocks[block]] = torch.maximum(best[:, blocks[block]], found)
            right.append(of_captions)

    total = [
        Competitors.none(len(best), len(place), len(image_of))
        for _ in range(1 if fold_of is None else 2)
    ]
    for source, (_, count) in enumerate(plan):
        for number in range(count):
            sent: Any = None
            if source == distributed.rank():
                columns = own[number][1]
                sent = texts.number[columns], texts.block(columns), right[number]
            captions, text, of_captions = distributed.broadcast_object(sent, source)  # collective
            for block in range(most_blocks):
                heartbeat()
                if block >= len(blocks):
                    continue
                rows = blocks[block]
                i2t, t2i = (x.cpu() for x in scored(rows, text))  # CPU-GPU sync
                pairs = (
                    images.number[rows],
                    captions,
                    mine(rows, captions),
                    best[:, rows],
                    of_captions,
                )
                total[0].add(i2t, t2i, *pairs)
                if fold_of is not None:
                    same = fold_of[images.number[rows], None] == fold_of[image_of[captions]]
                    total[1].add(i2t, t2i, *pairs, compared=same)
    for counts in total:
        for x in (counts.i2t, counts.t2i):
            distributed.sum_over_ranks(x)  # collective
    return total[0], total[1] if fold_of is not None else None


def _caption_blocks(places: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Yield (number of a block of pictures, rows of at most `CAPTIONS` captions whose pictures lie in it), in order.

    `places`: int64 [t], the row of each caption's picture among this rank's pictures.
    """
    by_block = (places // PICTURES).sort(stable=True)
    pairs = zip(by_block.values.tolist(), by_block.indices.tolist(), strict=True)
    for block, group in groupby(pairs, key=lambda pair: pair[0]):
        for part in torch.tensor([position for _, position in group]).split(CAPTIONS):
            yield block, part
