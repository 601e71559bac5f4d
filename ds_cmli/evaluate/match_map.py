"""Match maps as pictures: a picture, and a tile for each word, tinted where the word fits."""

import textwrap

import numpy as np
import torch
from PIL import Image, ImageColor, ImageDraw, ImageFont
from torch import Tensor
from torch.nn.functional import interpolate, max_pool2d

from ds_cmli.data.tokens import CaptionTokenizer
from ds_cmli.distributed import process_group as distributed
from ds_cmli.evaluate.embed import Embedded
from ds_cmli.scores import Match, match

TILE, SIDE, LINE = 176, 190, 26  # pixels: a tile, a tile with its gap, the height of a text line
COLUMNS, LETTERS = 6, 16  # tiles in a row, characters above a tile


def sheet(image: Tensor, text: str, match: Match) -> Image.Image:
    """Draw a caption, its picture, uint8 [3, H, W], and a tile for each word."""
    picture = interpolate(image[None].float(), (TILE, TILE), mode="bilinear", antialias=True)[0]
    tiles = [picture, *(tile(picture, values, match.grid) for values in match.similarity)]
    lines = textwrap.wrap(text, COLUMNS * LETTERS)
    height = len(lines) * LINE - (-len(tiles) // COLUMNS) * (LINE + SIDE)
    out = Image.new("RGB", (COLUMNS * SIDE, height), "white")
    pen = ImageDraw.Draw(out)
    font = ImageFont.load_default(LINE - 8)
    for number, line in enumerate(lines):
        pen.text((0, number * LINE), line, "black", font)
    for number, (word, pixels) in enumerate(zip(["", *match.words], tiles, strict=True)):
        row, column = divmod(number, COLUMNS)
        x = column * SIDE
        y = len(lines) * LINE + row * (LINE + SIDE)
        pen.text((x, y), word[:LETTERS], "black", font)
        out.paste(Image.fromarray(pixels.byte().permute(1, 2, 0).numpy()), (x, y + LINE))
    return out


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
    without_border = -max_pool2d(-best[None], 7, 1, 3)
    return (paper * (1 - 0.9 * share * (1 - tint))).masked_fill(best > without_border, 29)


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
    sheets = {picture: drawn for of_rank in gathered for picture, drawn in of_rank.items()}
    return [np.asarray(sheets[picture]) for picture in sorted(sheets)]
