"""Draws a match map: the picture, and a tile for each word, tinted where the word fits.

Shapes: S image side in pixels, N patches, M words.
"""

from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from typing import Protocol

import numpy as np
from PIL import Image, ImageColor, ImageDraw, ImageFont, features
from torch import Tensor

from ds_cmli.common.plots import ACCENT

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
TILE = 176  # side of a word's tile in pixels
GAP = 14
LABEL, CAPTION = 20, 26  # heights of letters in pixels
MOST = 5  # columns of words
PAPER, INK, SOFT, LINE = (255, 255, 255), (29, 29, 31), (95, 99, 107), (214, 215, 220)
FADED = 0.5  # of the grey picture behind a tint: how far it is from black to white paper
TINT = 0.9  # share of the accent where a word fits best
# Used for characters that Pillow's own font lacks, where they are installed.
FONTS = ("DejaVuSans.ttf", "NotoSansCJK-Regular.ttc", "NotoSans-Regular.ttf", "wqy-zenhei.ttc")
NOWHERE = "\U0010ffff"  # a character that no font has


class Matched(Protocol):
    """One model's match of a caption and a picture."""

    words: list[str]  # M
    similarity: Tensor  # [M, N] fp32
    grid: tuple[int, int]  # rows and columns of patches


def sheet(image: Tensor, text: str, matches: Mapping[str, Matched]) -> np.ndarray:
    """Draw a caption, its picture, uint8 [3, S, S], and a block per model, as uint8 [h, w, 3].

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
    out = Image.new("RGB", (width, heading + tall * len(matches)), PAPER)
    pen = ImageDraw.Draw(out)
    for number, line in enumerate(lines):
        pen.text((GAP, GAP + number * (CAPTION + 8)), line, font=font_for(line, CAPTION), fill=INK)
    for block, (name, match) in enumerate(matches.items()):
        top = heading + tall * block
        if names:
            pen.text((GAP, top + 4), name, font=font_for(name, LABEL), fill=SOFT)
        _draw_block(out, top + names, image, match, columns)
    return np.asarray(out)


def _draw_block(out: Image.Image, top: int, image: Tensor, match: Matched, columns: int) -> None:
    """The picture, as large as four tiles, and the words beside and below it."""
    pen = ImageDraw.Draw(out)
    whole = Image.fromarray(image.permute(1, 2, 0).numpy())
    side = 2 * TILE + GAP
    first = top + LABEL + 10
    out.paste(whole.resize((side, side), Image.Resampling.BICUBIC), (GAP, first))
    pen.rectangle((GAP, first, GAP + side - 1, first + side - 1), outline=LINE)
    small = whole.resize((TILE, TILE), Image.Resampling.BICUBIC)
    for w, (row, column) in enumerate(_places(len(match.words), columns)):
        x, y = GAP + column * (TILE + GAP), top + _row(row)
        word, *more = wrapped(match.words[w], LABEL, TILE - LABEL)
        word += "…" if more else ""
        pen.text((x, y + 2), word, font=font_for(word, LABEL), fill=INK)
        out.paste(tile(small, match.similarity[w].numpy(), match.grid), (x, y + LABEL + 10))
        pen.rectangle((x - 1, y + LABEL + 9, x + TILE, y + LABEL + 10 + TILE), outline=LINE)


def _row(number: int) -> int:
    """Where a row of tiles begins, below the block's top."""
    return number * (LABEL + 10 + TILE + GAP // 2)


def _places(words: int, columns: int) -> list[tuple[int, int]]:
    """The row and column of each word: two rows beside the picture, then rows of full width."""
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
    found = [ImageFont.load_default(size)]
    for name in FONTS:
        with suppress(OSError):
            found.append(ImageFont.truetype(name, size))
    return found


@cache
def _has(font: Font, character: str) -> bool:
    """Whether the character is drawn otherwise than one that no font has."""
    return character.isspace() or bytes(font.getmask(character)) != bytes(font.getmask(NOWHERE))
