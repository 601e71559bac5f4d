"""Match maps of a few held-out pairs, always the same ones, from the embeddings of an evaluation.

They need no forward pass and no random numbers.
Shapes: S image side in pixels, N patches, M tokens of a caption.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ds_cmli.cmli.contrastive import upcast
from ds_cmli.common.trackers import MATCH_MAPS
from ds_cmli.data.held_out import HeldOut
from ds_cmli.distributed import process_group as distributed
from ds_cmli.evaluate.split import Share

COLUMNS = 6  # tiles per row
TILE = 168  # side of a tile in pixels
LINE = 18  # height of a line of text in pixels
DARK = 0.15  # brightness of the picture where a word fits least
FRAME = (0, 255, 255)  # colour of the words and of the frame around a word's best patch


@dataclass
class MatchMap:
    """The match map of one pair."""

    image: Tensor  # uint8 [3, S, S]
    text: str
    words: list[str]  # M
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


def match_maps(share: Share, held_out: HeldOut, tokenizer: Any, grid: tuple[int, int], count: int) -> list[MatchMap]:
    """The maps of the first `count` usable pictures with their first captions, the same on every rank. Collective.

    Args:
        tokenizer: the `CaptionTokenizer`, which decodes the tokens to words.
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
        ids = [i for i, valid in zip(sample.tokens.input_ids, sample.tokens.valid, strict=True) if valid]
        tokens = share.texts.tokens[share.texts.tokens_of(text_row[caption])]  # [M, D]
        patches = share.images.patches[image_row[picture_number]]  # [N, D]
        words = [tokenizer.decode([i]).strip() for i in ids]
        similarity = upcast(tokens) @ upcast(patches).t()
        mine[order] = MatchMap(sample.image, tokenizer.decode(ids), words, similarity, grid)
    everywhere = {order: one for part in distributed.gather_objects(mine) for order, one in part.items()}  # collective
    return [everywhere[order] for order in sorted(everywhere)]


def picture(one: MatchMap) -> np.ndarray:
    """Draw the caption, the picture, and for each word a tile lit where the word fits: uint8 [height, width, 3].

    Brightness rises from a word's lowest to its highest similarity; a frame marks its best patch (the first, if tied).
    """
    tiles = [("", _resized(one.image)), *zip(one.words, _lit(one), strict=True)]
    rows = -(-len(tiles) // COLUMNS)
    sheet = Image.new("RGB", (min(len(tiles), COLUMNS) * TILE, LINE + rows * (LINE + TILE)))
    pen = ImageDraw.Draw(sheet)
    font = ImageFont.load_default()
    pen.text((2, 3), _printable(one.text, font), font=font, fill=(255, 255, 255))
    for number, (word, tile) in enumerate(tiles):
        row, column = divmod(number, COLUMNS)
        x, y = column * TILE, LINE + row * (LINE + TILE)
        pen.text((x + 2, y + 3), _printable(word, font), font=font, fill=FRAME)
        sheet.paste(tile, (x, y + LINE))
    return np.asarray(sheet)


def _resized(image: Tensor) -> Image.Image:
    return Image.fromarray(image.permute(1, 2, 0).numpy()).resize((TILE, TILE), Image.Resampling.BICUBIC)


def _lit(one: MatchMap) -> list[Image.Image]:
    """One tile for each word."""
    image = np.asarray(_resized(one.image), dtype=np.float32)  # [TILE, TILE, 3]
    rows, columns = one.grid
    out = []
    for values in one.similarity:  # [N]
        low, high = values.min(), values.max()
        share = ((values - low) / (high - low).clamp(min=1e-6)).view(rows, columns)
        light = torch.nn.functional.interpolate(share[None, None], size=(TILE, TILE))[0, 0].numpy()  # nearest
        tile = Image.fromarray((image * (DARK + (1 - DARK) * light[..., None])).astype(np.uint8))
        row, column = divmod(int(values.argmax()), columns)
        box = (column * TILE // columns, row * TILE // rows, (column + 1) * TILE // columns, (row + 1) * TILE // rows)
        ImageDraw.Draw(tile).rectangle((box[0], box[1], box[2] - 1, box[3] - 1), outline=FRAME, width=2)
        out.append(tile)
    return out


def _printable(text: str, font: Any) -> str:
    """Replace characters that the font of a Pillow without FreeType cannot draw."""
    if isinstance(font, ImageFont.FreeTypeFont):
        return text
    return text.encode("latin-1", "replace").decode("latin-1")
