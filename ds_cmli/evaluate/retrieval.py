"""Recall at 1, 5 and 10 for pictures with several captions, over all ranks and in blocks.

No rank ever holds a whole row of the score matrix. Each rank keeps its own pictures and their
captions. Captions are communicated: each block of them is broadcast from its rank to all others,
which score it against their own pictures, block by block. Tied scores are treated exactly.

Shapes: K kinds of scores (global, cmli, combined), n captions, m pictures; a block has r of the
pictures and b of the captions.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ds_cmli.cmli import cmli_scores
from ds_cmli.cmli.pair_scores import both_ways
from ds_cmli.distributed import process_group as distributed
from ds_cmli.evaluate.embed import EmbedSettings, Share
from ds_cmli.evaluate.report import prefixed

RECALLS = (1, 5, 10)
PICTURES = 128  # pictures per block
CAPTIONS = 512  # captions per block, at most


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
            found = torch.stack([above, tied, positives], 2)
            counts.index_add_(1, queries, found.double().cpu())  # CPU-GPU sync

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


def chance(image_of: Tensor) -> dict[str, float]:
    """The recalls of uninformative scores, `chance/i2t_r1` ...

    `image_of`: int64 [n], each caption's picture.
    """
    captions = image_of.unique(return_counts=True)[1].double()  # [m], of each picture
    none = torch.zeros_like(captions)
    i2t = torch.stack([none, len(image_of) - captions, captions], 1)
    t2i = torch.tensor([[0, len(captions) - 1, 1]], dtype=torch.float64)
    return prefixed("chance/", _recalls({"i2t": i2t, "t2i": t2i}))


def kinds(scales: dict[str, float]) -> list[str]:
    """The kinds of scores to evaluate, given 1/temperature of the kinds that the losses compare."""
    if "cmli" in scales:
        return ["global", "cmli", "combined"]
    return ["global"]


class Captions(NamedTuple):
    """A block of captions on the CPU, as one rank sends it to the others."""

    number: Tensor  # int64 [b]
    cls: Tensor  # [b, H], fp32
    tokens: Tensor  # [b, M, D]
    token_mask: Tensor  # bool [b, M]


@dataclass
class RetrievalScorer:
    """Scores this rank's pictures, block by block, with blocks of captions."""

    share: Share
    scales: dict[str, float]
    device: torch.device

    def __post_init__(self):
        starts = range(0, len(self.share.images.number), PICTURES)
        self.blocks = [slice(start, start + PICTURES) for start in starts]

    def captions(self, rows: Tensor) -> Captions:
        """Some rows of this rank's own captions."""
        texts = self.share.texts
        return Captions(texts.number[rows], *texts.block(rows))

    def block(self, number: int, captions: Captions) -> ScoreBlock:
        """The scores of one block of pictures. CPU-GPU sync."""
        images, rows = self.share.images, self.blocks[number]
        cls, tokens = captions.cls.to(self.device), captions.tokens.to(self.device)
        mask = captions.token_mask.to(self.device)
        cosines = images.cls[rows].to(self.device) @ cls.t()
        if "cmli" not in self.scales:
            i2t = t2i = cosines[None].cpu()
        else:
            patches = images.patches[rows].to(self.device)
            present = images.patch_mask(rows, self.device)
            scores = cmli_scores(patches, tokens, mask, present)
            both = both_ways(cosines, scores, self.scales)
            found = zip(*map(both.__getitem__, kinds(self.scales)), strict=True)
            i2t, t2i = (torch.stack(scores).cpu() for scores in found)
        pictures = images.number[rows]
        is_positive = pictures[:, None] == self.share.held_out.image_of[captions.number]
        return ScoreBlock(pictures, captions.number, i2t, t2i, is_positive)

    def own_captions(self) -> list[tuple[int, Tensor]]:
        """This rank's captions in parts: the block of their pictures, and their rows."""
        images, texts = self.share.images, self.share.texts
        image_of = self.share.held_out.image_of
        row = torch.full((int(image_of.max()) + 1,), -1)  # [m], each picture's row in `images`
        row[images.number] = torch.arange(len(images.number))
        blocks = row[image_of[texts.number]] // PICTURES
        out = []
        for block in range(len(self.blocks)):
            rows = (blocks == block).nonzero().flatten()
            out += [(block, part) for part in rows.split(CAPTIONS) if len(part)]
        return out


def rank_counts(
    share: Share, scales: dict[str, float], how: EmbedSettings, fold_of: Tensor | None = None
) -> dict[str, RankCounts]:
    """Compare the positives with all candidates, over the pictures and captions of all ranks.

    Args:
        share: this rank's pictures, and exactly their captions.
        scales: 1/temperature of each kind of scores, from `Objective.score_scales`.
        fold_of: int64 [m], the fold of each picture.

    Returns:
        The counts over all pairs at "", and with `fold_of` within folds at "fold/", on every rank.

    Collective.
    """
    scorer = RetrievalScorer(share, scales, how.device)
    own = scorer.own_captions()
    plan = distributed.gather_objects((len(scorer.blocks), len(own)))  # collective
    blocks, captions = map(list, zip(*plan, strict=True))  # the numbers of each rank's
    best, positives = _positives(scorer, own, max(captions), how)

    image_of = share.held_out.image_of
    size = len(kinds(scales)), int(image_of.max()) + 1, len(image_of)
    counts = {"": RankCounts.zeros(*size)}
    if fold_of is not None:
        counts["fold/"] = RankCounts.zeros(*size)
    for sent, positive in _exchanged(scorer, own, positives, captions):  # collective
        for number in range(max(blocks)):
            how.heartbeat()
            if number >= len(scorer.blocks):
                continue
            block = scorer.block(number, sent)  # CPU-GPU sync
            scores = best[:, scorer.blocks[number]], positive
            counts[""].add(block, *scores)
            if fold_of is not None:
                same = fold_of[block.pictures, None] == fold_of[image_of[block.captions]]
                counts["fold/"].add(block, *scores, compared=same)
    for found in counts.values():
        distributed.sum_over_ranks(found.i2t)  # collective
        distributed.sum_over_ranks(found.t2i)  # collective
    return counts


def _positives(
    scorer: RetrievalScorer, own: list[tuple[int, Tensor]], turns: int, how: EmbedSettings
) -> tuple[Tensor, list[Tensor]]:
    """The scores of this rank's positive pairs, which lie in the blocks on the diagonal.

    They are computed as again in `rank_counts`, so that a score is bitwise equal to itself.

    Returns:
        [K, pictures], the highest i2t score of each picture with one of its captions; and for each
        of this rank's blocks of captions [K, b], the t2i score of each with its picture.
    """
    best = torch.full((len(kinds(scorer.scales)), len(scorer.share.images.number)), -torch.inf)
    positives = []
    for turn in range(turns):
        how.heartbeat()
        if turn < len(own):
            number, rows = own[turn]
            found = scorer.block(number, scorer.captions(rows)).positive_scores()
            pictures = scorer.blocks[number]
            best[:, pictures] = torch.maximum(best[:, pictures], found[0])
            positives.append(found[1])
    return best, positives


def _exchanged(
    scorer: RetrievalScorer,
    own: list[tuple[int, Tensor]],
    positives: list[Tensor],
    counts: list[int],
) -> Iterator[tuple[Captions, Tensor]]:
    """Yield the blocks of captions of all ranks, and their t2i scores [K, b] as in `_positives`.

    `counts`: the number of blocks of each rank. Collective.
    """
    for source, count in enumerate(counts):
        for number in range(count):
            mine = None
            if source == distributed.rank():
                mine = scorer.captions(own[number][1]), positives[number]
            sent = distributed.broadcast_object(mine, source)  # collective
            assert sent is not None  # the source's own
            yield sent
