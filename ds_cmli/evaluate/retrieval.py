"""Recall at 1, 5 and 10 for pictures with several captions, over all ranks and in blocks.

No rank ever holds a whole row of the score matrix. Each rank keeps its own pictures and their
captions. Captions are communicated: each block of them is broadcast from its rank to all others,
which score it against their own pictures, block by block. Tied scores are treated exactly.

Shapes: K kinds of scores (global, cmli, combined), n captions, m pictures; a block has r of
the pictures and b of the captions.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ds_cmli.cmli import cmli_scores
from ds_cmli.distributed import process_group as distributed
from ds_cmli.evaluate.embed import EmbedSettings, Images, Share
from ds_cmli.evaluate.metrics import RankCounts, ScoreBlock
from ds_cmli.scores import BothWays, both_ways

PICTURES = 128  # pictures per block
CAPTIONS = 512  # captions per block, at most


def kinds(scales: dict[str, float]) -> list[str]:
    """The kinds of scores to evaluate, given 1/temperature of the kinds that the losses compare."""
    return ["global", "cmli", "combined"] if "cmli" in scales else ["global"]


def pair_scores(
    images: Images,
    rows: slice | Tensor,
    captions: tuple[Tensor, Tensor, Tensor],
    scales: dict[str, float],
    device: torch.device,
) -> dict[str, BothWays]:
    """Each of `kinds(scales)` for r pictures and b captions, [r, b] on the CPU. CPU-GPU sync.

    Args:
        rows: of `images`, a range or int64 [r].
        captions: as from `Texts.block`.
    """
    cls, tokens, mask = (part.to(device) for part in captions)
    cosines = images.cls[rows].to(device) @ cls.t()
    cmli = None
    if "cmli" in scales:
        patches = images.patches[rows].to(device)
        cmli = cmli_scores(patches, tokens, mask)
    both = both_ways(cosines, cmli, scales)
    return {kind: BothWays(*map(Tensor.cpu, both[kind])) for kind in kinds(scales)}


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
        both = pair_scores(images, rows, captions[1:], self.scales, self.device)
        i2t, t2i = map(torch.stack, zip(*both.values(), strict=True))
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
    share: Share,
    scales: dict[str, float],
    how: EmbedSettings,
    fold_of: Tensor | None = None,
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
    for of_kind in counts.values():
        distributed.sum_over_ranks(of_kind.i2t)  # collective
        distributed.sum_over_ranks(of_kind.t2i)  # collective
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
            scores = scorer.block(number, scorer.captions(rows)).positive_scores()
            pictures = scorer.blocks[number]
            best[:, pictures] = torch.maximum(best[:, pictures], scores[0])
            positives.append(scores[1])
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
