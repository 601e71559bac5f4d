"""Retrieval over all ranks, in blocks of the score matrix: no rank ever holds a whole row of it.

Each rank keeps its own pictures and their captions. Captions are communicated: each block of them is broadcast from its
rank to all others, which score it against their own pictures, block by block.
Shapes: K kinds of scores (global, cmli, combined), n captions, m pictures; r pictures and b captions of a block.
"""

from collections.abc import Callable, Iterator
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from ds_cmli.cmli import cmli_scores
from ds_cmli.cmli.pair_scores import both_ways
from ds_cmli.distributed import process_group as distributed
from ds_cmli.evaluate.embed import Images, Texts
from ds_cmli.evaluate.recall import Competitors, own_scores

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
