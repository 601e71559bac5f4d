"""Match maps as pictures: a picture, and a tile for each word, tinted where the word fits."""

import textwrap
from collections import ChainMap
from functools import cache
from typing import cast

import numpy as np
import torch
from PIL import Image, ImageColor, ImageDraw, ImageFont
from PIL.ImageFont import FreeTypeFont
from torch import Tensor
from torch.nn.functional import interpolate, max_pool2d, pad

from ds_cmli.data.tokens import CaptionTokenizer
from ds_cmli.distributed import process_group as distributed
from ds_cmli.evaluate.embed import Embedded
from ds_cmli.scores import Match, match

TILE = 176  # pixels of a side
FRAME = 3  # pixels of the frame around the best patch
GAP = 14  # pixels between tiles, and at the edges
LINE = 26  # pixels of a text line's height
COLUMNS = 6  # tiles in a row
FONT_SIZE = 18
MAX_LETTERS = 96  # in a line of the caption


def sheet(image: Tensor, text: str, match: Match) -> Image.Image:
    """Draw a caption, its picture, uint8 [3, H, W], and a tile for each word."""
    picture = interpolate(image[None].float(), (TILE, TILE), mode="bilinear", antialias=True)[0]
    tiles = [picture, *(tile(picture, values, match.grid) for values in match.similarity)]
    lines = textwrap.wrap(text, MAX_LETTERS)
    num_rows = -(-len(tiles) // COLUMNS)
    width = GAP + COLUMNS * (TILE + GAP)
    height = GAP + len(lines) * LINE + num_rows * (LINE + TILE + GAP)
    out = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(out)

    def write(x: int, y: int, line: str, max_width: int) -> None:
        excess = load_font(FONT_SIZE).getlength(line) / max_width
        font = load_font(FONT_SIZE / max(excess, 1))
        pen.text((x, y + FONT_SIZE), line, "black", font, anchor="ls")  # on its baseline

    for number, line in enumerate(lines):
        write(GAP, GAP + number * LINE, line, width - 2 * GAP)
    for number, (word, pixels) in enumerate(zip(["", *match.words], tiles, strict=True)):
        row, column = divmod(number, COLUMNS)
        x = GAP + column * (TILE + GAP)
        y = GAP + len(lines) * LINE + row * (LINE + TILE + GAP)
        write(x, y, word, TILE)
        out.paste(Image.fromarray(pixels.byte().permute(1, 2, 0).numpy()), (x, y + LINE))
    return out


@cache
def load_font(size: float) -> FreeTypeFont:
    try:
        return ImageFont.truetype("DejaVuSans.ttf", size)
    except OSError:  # it is not installed
        return cast(FreeTypeFont, ImageFont.load_default(size))  # with letters of ASCII alone


def tile(picture: Tensor, values: Tensor, grid: tuple[int, int]) -> Tensor:
    """Return the picture in grey, tinted by the square of a patch's place in the range of values.

    [3, H, W], [N] -> [3, H, W], 0 to 255. A frame marks the best patch: the first, if tied.
    """
    low, high = values.aminmax()
    share = ((values - low) / (high - low).clamp(min=1e-6)).square().float()
    best = (torch.arange(len(values)) == values.argmax()).float()
    maps = torch.stack([share, best]).view(1, 2, *grid)
    share, best = interpolate(maps, picture.shape[1:], mode="nearest")[0]
    tint = torch.tensor(ImageColor.getrgb("#6f4bd8"))[:, None, None] / 255
    paper = 127.5 + 0.5 * picture.mean(0)  # as ink on it, lines stay visible under the tint
    around = pad(best[None], (FRAME, FRAME, FRAME, FRAME))  # the frame is closed at edges too
    without_frame = -max_pool2d(-around, 2 * FRAME + 1, 1)
    return (paper * (1 - 0.9 * share * (1 - tint))).masked_fill(best > without_frame, 29)


def match_maps(
    embedded: Embedded, tokenizer: CaptionTokenizer, grid: tuple[int, int], count: int
) -> list[np.ndarray]:
    """Draw the first `count` usable pictures of all ranks and their first captions. Collective."""
    first = {embedded.image_of[caption]: caption for caption in reversed(embedded.captions)}
    own_sheets = {}
    for picture, caption in sorted(first.items())[:count]:
        if caption in embedded.texts:
            _, text = embedded.pairs.rows[caption]
            tokens = embedded.texts[caption].parts
            patches = embedded.images[picture].parts
            image = embedded.pairs.image(caption)
            own_sheets[picture] = sheet(image, text, match(tokenizer, text, tokens, patches, grid))
    gathered = distributed.gather_objects(own_sheets)  # collective
    sheets = ChainMap(*gathered)
    return [np.asarray(sheets[picture]) for picture in sorted(sheets)]
