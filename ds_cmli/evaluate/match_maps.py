"""Match maps of a few held-out pairs, always the same ones, from the embeddings of an evaluation.

They need no forward pass and no random numbers.
Shapes: S image side in pixels, N patches, M tokens of a caption.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from ds_cmli.cmli.contrastive import upcast
from ds_cmli.common.match_sheet import sheet
from ds_cmli.distributed import process_group as distributed
from ds_cmli.evaluate.held_out import HeldOut
from ds_cmli.evaluate.split import Share
from ds_cmli.trackers import MATCH_MAPS


@dataclass
class MatchMap:
    """The match map of one pair."""

    image: Tensor  # uint8 [3, S, S]
    text: str
    words: list[str]  # M, as the caption has them, also those that the tokenizer does not know
    similarity: Tensor  # [M, N] fp32, cosine similarities of tokens and patches
    grid: tuple[int, int]  # numbers of rows and columns of patches


def draw(
    writer: Any, step: int, split: str, count: int, tokenizer: Any, share: Share, held_out: HeldOut,
    grid: tuple[int, int],
) -> None:  # fmt: skip
    """Write the match maps of `count` pairs with rank 0's writer. Collective unless `count` is 0."""
    if not count:
        return
    found = match_maps(share, held_out, tokenizer, grid, count)  # collective
    if distributed.is_main():
        for number, one in enumerate(found):
            writer.picture(step, f"{MATCH_MAPS}{split}/{number}", picture(one))


def match_maps(
    share: Share, held_out: HeldOut, tokenizer: Any, grid: tuple[int, int], count: int
) -> list[MatchMap]:
    """The maps of the first `count` usable pictures with their first captions, the same on every rank. Collective.

    Args:
        tokenizer: the `CaptionTokenizer`, which tells where in a caption its tokens stand.
    """
    first: dict[int, int] = {}  # caption by picture
    for caption in share.captions.tolist():
        first.setdefault(int(held_out.image_of[caption]), caption)
        if len(first) == count:
            break
    image_row = {number: row for row, number in enumerate(share.images.number.tolist())}
    text_row = {number: row for row, number in enumerate(share.texts.number.tolist())}
    mine = {}
    for order, (picture_number, caption) in enumerate(first.items()):
        if picture_number not in image_row:
            continue  # the picture belongs to another rank
        sample = held_out.pairs.pair(held_out.rows[caption])
        text = sample.tokens.text
        spans = [
            span for span, v in zip(tokenizer.spans(text), sample.tokens.valid, strict=True) if v
        ]
        tokens = share.texts.tokens[share.texts.tokens_of(text_row[caption])]  # [M, D]
        patches = share.images.patches[image_row[picture_number]]  # [N, D]
        words = [text[start:end] for start, end in spans]
        similarity = upcast(tokens) @ upcast(patches).t()
        mine[order] = MatchMap(sample.image, text[: spans[-1][1]], words, similarity, grid)
    everywhere = {
        order: one for part in distributed.gather_objects(mine) for order, one in part.items()
    }  # collective
    return [everywhere[order] for order in sorted(everywhere)]


def picture(one: MatchMap) -> np.ndarray:
    """The caption, the picture, and a tile for each word: uint8 [height, width, 3]."""
    return sheet(one.image, one.text, {"": one})
