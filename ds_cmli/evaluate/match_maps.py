"""Match maps as pictures: a picture, and a tile for each word, tinted where the word fits.

Those of a few held-out pairs, always the same ones, come from the embeddings of an evaluation. They
need no forward pass and no random numbers. Shapes: S image side in pixels, N patches, M tokens
of a caption, D embedding dimension.
"""

from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from itertools import compress
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from PIL import Image, ImageColor, ImageDraw, ImageFont, ImageOps, features
from torch import Tensor

from ds_cmli.common.plots import ACCENT, SOFT
from ds_cmli.data.demo_pictures import on_white
from ds_cmli.data.tokens import CaptionTokenizer
from ds_cmli.distributed import process_group as distributed
from ds_cmli.evaluate.embed import Share, rows_of
from ds_cmli.scores import Match, match

if TYPE_CHECKING:
    from ds_cmli.metrics import NullWriter, Writer

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
TILE = 176  # side of a word's tile in pixels
GAP = 14
LABEL, CAPTION = 20, 26  # heights of letters in pixels
MOST = 5  # columns of words
INK, LINE = (29, 29, 31), (214, 215, 220)  # of frames
LETTERS = ImageColor.getrgb(SOFT)
GROUND = (*LETTERS, 0)  # no other colour at the letters' edges, on light and on dark pages
FADED = 0.5  # of the grey picture behind a tint: how far it is from black to white paper
TINT = 0.9  # share of the accent where a word fits best
# Used for characters that Pillow's own font lacks, where they are installed.
FONTS = ("DejaVuSans.ttf", "NotoSansCJK-Regular.ttc", "NotoSans-Regular.ttf", "wqy-zenhei.ttc")
NOWHERE = "\U0010ffff"  # a character that no font has


def sheet(image: Tensor, text: str, matches: Mapping[str, Match]) -> Image.Image:
    """Draw a caption, its picture, uint8 [3, H, W], and a block per model, on transparent ground.

    A tint rises with the square of where a similarity lies between the word's lowest and highest;
    a frame marks its best patch (the first, if tied).
    """
    words = len(next(iter(matches.values())).words)
    columns = max(1, min(MOST, -(-words // 2)))
    width = GAP + (columns + 2) * (TILE + GAP)
    lines = wrapped(text, CAPTION, width - 2 * GAP)
    heading = GAP + len(lines) * (CAPTION + 8)
    names = LABEL + 12 if any(matches) else 0
    tall = names + _row(_places(words, columns)[-1][0] + 1 if words > 2 * columns else 2) + GAP
    out = Image.new("RGBA", (width, heading + tall * len(matches)), GROUND)
    pen = ImageDraw.Draw(out)
    for number, line in enumerate(lines):
        pen.text(
            (GAP, GAP + number * (CAPTION + 8)), line, font=font_for(line, CAPTION), fill=LETTERS
        )
    for block, (name, matched) in enumerate(matches.items()):
        top = heading + tall * block
        if names:
            pen.text((GAP, top + 4), name, font=font_for(name, LABEL), fill=LETTERS)
        _draw_block(out, top + names, image, matched, columns)
    return out


def _draw_block(out: Image.Image, top: int, image: Tensor, match: Match, columns: int) -> None:
    """The picture, as large as four tiles, and the words next to and below it."""
    pen = ImageDraw.Draw(out)
    whole = Image.fromarray(image.permute(1, 2, 0).numpy())
    side = 2 * TILE + GAP
    first = top + LABEL + 10
    large, small = (ImageOps.contain(whole, (size, size)) for size in (side, TILE))  # bicubic
    out.paste(large, (GAP, first))
    pen.rectangle((GAP, first, GAP + large.width - 1, first + large.height - 1), outline=LINE)
    for w, (row, column) in enumerate(_places(len(match.words), columns)):
        x, y = GAP + column * (TILE + GAP), top + _row(row)
        word, *more = wrapped(match.words[w], LABEL, TILE - LABEL)
        word += "…" if more else ""
        pen.text((x, y + 2), word, font=font_for(word, LABEL), fill=LETTERS)
        out.paste(tile(small, match.similarity[w].numpy(), match.grid), (x, y + LABEL + 10))
        end = x + small.width, y + LABEL + 10 + small.height
        pen.rectangle((x - 1, y + LABEL + 9, *end), outline=LINE)


def _row(number: int) -> int:
    """Where a row of tiles begins, below the block's top."""
    return number * (LABEL + 10 + TILE + GAP // 2)


def _places(words: int, columns: int) -> list[tuple[int, int]]:
    """The row and column of each word: two rows next to the picture, then rows of full width."""
    beside = [(row, column + 2) for row in range(2) for column in range(columns)]
    whole = columns + 2
    return [*beside, *((2 + i // whole, i % whole) for i in range(words))][:words]


def tile(picture: Image.Image, values: np.ndarray, grid: tuple[int, int]) -> Image.Image:
    """A word's tile: the picture in grey, tinted patch by patch. `values`: [N] similarities."""
    rows, columns = grid
    size = picture.size
    low, high = values.min(), values.max()
    share = ((values - low) / max(high - low, 1e-6)).reshape(rows, columns).astype(np.float32) ** 2
    share = np.asarray(Image.fromarray(share).resize(size, Image.Resampling.NEAREST))[..., None]
    grey = np.asarray(picture.convert("L"), np.float32)[..., None]
    grey = 255 - FADED * (255 - grey)
    tint = np.array(ImageColor.getrgb(ACCENT), np.float32) / 255
    # As ink on paper: lines stay visible under the tint.
    lit = grey * (1 - TINT * share * (1 - tint))
    out = Image.fromarray(lit.astype(np.uint8))
    row, column = divmod(int(values.argmax()), columns)
    left, right = column * size[0] // columns, (column + 1) * size[0] // columns
    above, below = row * size[1] // rows, (row + 1) * size[1] // rows
    ImageDraw.Draw(out).rectangle((left, above, right - 1, below - 1), outline=INK, width=3)
    return out


def wrapped(text: str, size: int, width: int) -> list[str]:
    """The text in lines that fit `width` pixels. A word that does not fit alone is broken."""
    lines = [""]
    for word in printable(text).split():
        longer = f"{lines[-1]} {word}".strip()
        if _length(longer, size) <= width:
            lines[-1] = longer
            continue
        lines += [""] if lines[-1] else []
        for character in word:
            if lines[-1] and _length(lines[-1] + character, size) > width:
                lines.append("")
            lines[-1] += character
    return lines


def _length(text: str, size: int) -> float:
    return font_for(text, size).getlength(text)


def printable(text: str) -> str:
    """Without the characters that the font of a Pillow without FreeType cannot draw."""
    if features.check("freetype2"):
        return text
    return text.encode("latin-1", "replace").decode("latin-1")


def font_for(text: str, size: int) -> Font:
    """The font that has most characters of the text; Pillow's own, if none has more."""
    return max(_fonts(size), key=lambda font: sum(_has(font, character) for character in set(text)))


@cache
def _fonts(size: int) -> list[Font]:
    if not features.check("freetype2"):
        return [ImageFont.load_default()]
    fonts = [ImageFont.load_default(size)]
    for name in FONTS:
        with suppress(OSError):
            fonts.append(ImageFont.truetype(name, size))
    return fonts


@cache
def _has(font: Font, character: str) -> bool:
    """Whether the character is drawn otherwise than one that no font has."""
    return character.isspace() or bytes(font.getmask(character)) != bytes(font.getmask(NOWHERE))


class MatchMap(NamedTuple):
    """A pair and its match, whose words are those that the caption has, also unknown ones."""

    image: Tensor  # uint8 [3, H, W]
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
    maps = match_maps(share, tokenizer, count)  # collective
    if distributed.is_main():
        for number, one in enumerate(maps):
            # The caption, the picture, and a tile for each word: uint8 [height, width, 3].
            picture = np.asarray(on_white(sheet(one.image, one.text, {"": one.match})))
            writer.picture(step, f"match-maps/{split}/{number}", picture)


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
        patches = images.patches[image_row[picture]]
        matches = match(tokens, patches, text, spans, images.grid)
        mine[order] = MatchMap(sample.image, text[: spans[-1][1]], matches)
    everywhere: dict[int, MatchMap] = {}
    for maps in distributed.gather_objects(mine):  # collective
        everywhere |= maps
    return [everywhere[order] for order in sorted(everywhere)]
