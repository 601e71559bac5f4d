"""Match maps as pictures: a picture, and a tile for each word, tinted where the word fits.

Those of a few held-out pairs, always the same ones, come from the embeddings of an evaluation. They
need no forward pass and no random numbers.
"""

import textwrap
from collections.abc import Mapping
from itertools import compress

import numpy as np
import torch
from PIL import Image, ImageColor, ImageDraw, ImageFont
from torch import Tensor
from torch.nn.functional import interpolate, max_pool2d

from ds_cmli.common.plots import ACCENT
from ds_cmli.data.tokens import CaptionTokenizer
from ds_cmli.distributed import process_group as distributed
from ds_cmli.evaluate.embed import Embedded
from ds_cmli.scores import Match, match

TILE, GAP, LINE = 176, 14, 26  # side of a tile, between tiles, height of a line of text, in pixels
COLUMNS, LETTERS = 6, 16  # tiles in a row, characters above a tile


def sheet(image: Tensor, text: str, matches: Mapping[str, Match]) -> Image.Image:
    """Draw a caption, its picture, uint8 [3, H, W], and the words' tiles of each model."""
    picture = interpolate(image[None].float(), (TILE, TILE), mode="bilinear", antialias=True)[0]
    rows: list[list[tuple[str, Tensor]]] = []
    for name, matched in matches.items():
        words = zip(matched.words, matched.similarity, strict=True)
        tiles = [(name, picture), *((word, tile(picture, x, matched.grid)) for word, x in words)]
        rows += [tiles[first : first + COLUMNS] for first in range(0, len(tiles), COLUMNS)]
    columns = max(map(len, rows))
    lines = textwrap.wrap(text, columns * LETTERS)
    side, top = TILE + GAP, GAP + len(lines) * LINE
    out = Image.new("RGB", (GAP + columns * side, top + len(rows) * (side + LINE)), "white")
    pen, font = ImageDraw.Draw(out), ImageFont.load_default(LINE - 8)
    texts = [(GAP, GAP + number * LINE, line) for number, line in enumerate(lines)]
    for number, tiles in enumerate(rows):
        for column, (word, pixels) in enumerate(tiles):
            x, y = GAP + column * side, top + number * (side + LINE)
            texts.append((x, y, word[:LETTERS]))
            out.paste(Image.fromarray(pixels.byte().permute(1, 2, 0).numpy()), (x, y + LINE))
    for x, y, line in texts:
        pen.text((x, y), line, "black", font)
    return out


def tile(picture: Tensor, values: Tensor, grid: tuple[int, int]) -> Tensor:
    """The picture in grey, tinted by the square of where a patch's similarity lies in their range.

    [3, H, W], [N] -> [3, H, W], 0 to 255. A frame marks the best patch: the first, if tied.
    """
    low, high = values.min(), values.max()
    share = ((values - low) / (high - low).clamp(min=1e-6)).square().view(1, 1, *grid)
    share = interpolate(share.float(), picture.shape[1:], mode="nearest")[0]
    tint = torch.tensor(ImageColor.getrgb(ACCENT))[:, None, None] / 255
    paper = 127.5 + 0.5 * picture.mean(0)  # as ink on it, lines stay visible under the tint
    out = paper * (1 - 0.9 * share * (1 - tint))
    best = (torch.arange(len(values)) == values.argmax()).view(1, 1, *grid).float()
    best = interpolate(best, picture.shape[1:], mode="nearest")
    inside = -max_pool2d(-best, 7, 1, 3)[0] > 0
    return out.masked_fill((best[0] > 0) & ~inside, 29)


def match_maps(
    own: Embedded, tokenizer: CaptionTokenizer, grid: tuple[int, int], count: int
) -> list[np.ndarray]:
    """The maps of the first `count` usable pictures with their first captions. Collective."""
    first: dict[int, int] = {}  # caption by picture
    for caption in own.captions:
        first.setdefault(own.image_of[caption], caption)
    mine = {}
    for picture, caption in [*first.items()][:count]:
        if caption in own.texts:
            text, image = own.pairs.text(caption), own.pairs.image(caption)
            spans = list(compress(tokenizer.spans(text), tokenizer(text).valid))
            tokens, patches = own.texts[caption][1], own.images[picture][1]
            drawn = sheet(image, text, {"": match(tokens, patches, text, spans, grid)})
            mine[picture] = np.asarray(drawn)
    every = {k: drawn for maps in distributed.gather_objects(mine) for k, drawn in maps.items()}
    return [every[picture] for picture in sorted(every)]
