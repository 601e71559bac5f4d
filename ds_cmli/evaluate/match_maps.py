"""Match maps of a few held-out pairs, always the same ones, from the embeddings of an evaluation.

They need no forward pass and no random numbers. Shapes: S image side in pixels, N patches, M tokens
of a caption, D embedding dimension.
"""

from itertools import compress
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from ds_cmli.cmli.pair_scores import Match, match
from ds_cmli.common.match_sheet import sheet
from ds_cmli.data.tokens import CaptionTokenizer
from ds_cmli.distributed import process_group as distributed
from ds_cmli.evaluate.embed import Share, rows_of
from ds_cmli.trackers import MATCH_MAPS

if TYPE_CHECKING:
    from ds_cmli.metrics import NullWriter, Writer


class MatchMap(NamedTuple):
    """A pair and its match, whose words are those that the caption has, also unknown ones."""

    image: Tensor  # uint8 [3, S, S]
    text: str
    match: Match


def draw(
    writer: "Writer | NullWriter",
    step: int,
    split: str,
    count: int,
    tokenizer: CaptionTokenizer,
    share: Share,
) -> None:
    """Write the match maps of `count` pairs with rank 0's writer. Collective if there are any."""
    if not count:
        return
    found = match_maps(share, tokenizer, count)  # collective
    if distributed.is_main():
        for number, one in enumerate(found):
            # The caption, the picture, and a tile for each word: uint8 [height, width, 3].
            picture = sheet(one.image, one.text, {"": one.match})
            writer.picture(step, f"{MATCH_MAPS}{split}/{number}", picture)


def match_maps(share: Share, tokenizer: CaptionTokenizer, count: int) -> list[MatchMap]:
    """The maps of the first `count` usable pictures with their first captions.

    They are the same on every rank. Collective.
    """
    held_out, images, texts = share.held_out, share.images, share.texts
    first: dict[int, int] = {}  # caption by picture
    for caption in share.captions.tolist():
        first.setdefault(int(held_out.image_of[caption]), caption)
        if len(first) == count:
            break
    image_row, text_row = rows_of(images.number), rows_of(texts.number)
    mine = {}
    for order, (picture, caption) in enumerate(first.items()):
        if picture not in image_row:
            continue  # it belongs to another rank
        sample = held_out.pairs.pair(held_out.rows[caption])
        text = sample.tokens.text
        spans = list(compress(tokenizer.spans(text), sample.tokens.valid))
        tokens = texts.tokens[texts.tokens_of(text_row[caption])]  # [M, D]
        patches = images.patches[image_row[picture]]  # [N, D]
        found = match(tokens, patches, text, spans, share.grid)
        mine[order] = MatchMap(sample.image, text[: spans[-1][1]], found)
    everywhere: dict[int, MatchMap] = {}
    for maps in distributed.gather_objects(mine):  # collective
        everywhere |= maps
    return [everywhere[order] for order in sorted(everywhere)]
