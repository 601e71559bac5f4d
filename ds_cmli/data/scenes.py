"""The demo pairs: scenes of one to four pictures, captioned with their names.

Each token of a name thus has a known place.

S image size in pixels, C = S // 2 the side of a cell.
"""

import random
import zlib
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from torch.utils.data import Dataset

from ds_cmli.common.errors import UserError
from ds_cmli.config.schema import AugmentationName as Name
from ds_cmli.data.batch import NO_PICTURE, Sample, spans_of_tokens
from ds_cmli.data.captions import drawn
from ds_cmli.data.demo_pictures import DemoPictures
from ds_cmli.data.sampler import Draw
from ds_cmli.data.tokens import CaptionTokenizer
from ds_cmli.data.transforms import Augmentation

TRAIN_SCENES = 20_000
EVAL_SCENES = 300
EVAL_SEED = 0  # validation scenes are the same in every run
# Words before the first name and before the others. With "names" each token has a place in the
# picture, as a comma would not.
NAMES = ("",), (" ",)
SENTENCES = (
    ("a picture of ", "this shows ", "there is ", "here we see "),
    (" next to ", " and ", " beside ", " together with "),
)
# One in this many arrangements of training concepts is reserved for the split "seen".
RESERVED = 16
COUNTS = (1, 2, 3, 4)
MANY = (3, 4)  # pictures in scenes with sentences
CORNERS = ((0, 0), (0, 1), (1, 0), (1, 1))  # cell -> row, column

Layout = list[tuple[int, int]]  # (concept, cell) of each picture
Text = tuple[str, list[tuple[int, int]]]  # a caption, and where each picture's name stands in it


class Scenes(Dataset):
    """A map-style data set of scenes, each a pure function of (split, seed, index).

    A scene shows one to four different pictures, each in its own quarter of a white image; its
    caption is their names in random order, or a sentence with three or four of them. A random patch
    lies in the picture that a token of a name stands for with probability 1/4. As sentences
    (`data.split_sentences`) a caption is of one picture, drawn for each turn.

    In training the probability of a scene is proportional to its number of pictures: scenes with
    more pictures teach more at the same cost.

    Splits: "train" and "seen" show training concepts, but never the same pictures in the same
    quarters; "unseen" shows held-out concepts. No two validation scenes show the same pictures, so
    each caption has one right image.

    Args:
        seed: the seed of the scenes.
        length: number of scenes.
        captions: "names" or "sentences", as `data.scenes`.
        augmentation: colour jitter and flips; a flip also swaps the quarters in
            `Sample.cell_picture`.

    Attributes:
        each_picture: `data.split_sentences`.
    """

    each_picture = False

    def __init__(
        self,
        split: str,
        seed: int,
        length: int,
        pictures: DemoPictures,
        tokenizer: CaptionTokenizer,
        captions: str = "names",
        augmentation: Mapping[Name, float] | None = None,
    ):
        if "random_resized_crop" in (augmentation or {}):
            raise UserError(
                "data.augmentation has 'random_resized_crop': the demo's scenes keep their "
                "pictures in quarters, leave it out or train on other --data"
            )
        self.augmentation = Augmentation(augmentation or {}, seed)
        self.split, self.seed, self.length, self.size = split, seed, length, pictures.size
        self.pictures, self.tokenizer = pictures, tokenizer
        self.words: tuple[tuple[str, ...], tuple[str, ...]] = NAMES
        self.counts: tuple[int, ...] = COUNTS
        if captions == "sentences":
            self.words, self.counts = SENTENCES, MANY
        self.concepts = pictures.training
        if split == "unseen":
            self.concepts = pictures.held_out
        # Drawn in advance for validation; training scenes are drawn on request.
        self._layouts: list[Layout] = []
        shown: set[frozenset[int]] = set()
        for index in range(0 if split == "train" else length):
            for layout in self._draw(index):
                concepts = frozenset(concept for concept, _ in layout)
                if concepts not in shown and (split == "unseen" or _reserved(layout)):
                    break
            shown.add(concepts)
            self._layouts.append(layout)

    def __len__(self) -> int:
        return self.length

    def layout(self, index: int) -> Layout:
        """(concept, cell) of each picture in the caption's order; cells are numbered row by row."""
        if not 0 <= index < self.length:
            raise IndexError(index)
        if self._layouts:
            return self._layouts[index]
        return next(layout for layout in self._draw(index) if not _reserved(layout))

    def _draw(self, index: int) -> Iterator[Layout]:
        """Yield random layouts with the scene's number of pictures.

        The caller takes the first that is allowed.
        """
        draw = random.Random(f"{self.split} {self.seed} {index}")
        count = draw.choices(self.counts, self.counts if self.split == "train" else None)[0]
        while True:
            concepts, cells = draw.sample(self.concepts, count), draw.sample(range(4), count)
            yield list(zip(concepts, cells, strict=True))

    def __getitem__(self, at: int | Draw) -> Sample:
        index, turn = Draw.of(at)
        draw = Draw(index, turn)
        sample = self._sample(index, self.text(draw))
        with self.augmentation.seeded(turn, index):
            sample.image, flipped = self.augmentation.pixels(sample.image)
        if flipped and sample.cell_picture is not None:
            sample.cell_picture = [sample.cell_picture[cell] for cell in (1, 0, 3, 2)]
        return sample

    def caption(self, index: int, order: Sequence[int] = ()) -> Text:
        """A caption that names pictures in this order; by default all, in that of the layout."""
        layout, (first, others) = self.layout(index), self.words
        key = f"words {self.split} {self.seed} {self.sentence_of(index)}"
        draw = random.Random(key + (f" {order}" if order else ""))
        caption, spans = "", [(0, 0)] * len(layout)
        for picture in order or range(len(layout)):
            name = self.pictures.names[layout[picture][0]]
            caption += draw.choice(others if caption else first)
            spans[picture] = (len(caption), len(caption) + len(name))
            caption += name
        return caption, spans

    def text(self, draw: Draw) -> Text:
        """The caption that a draw gets."""
        (index, turn), order = draw, ()
        if self.each_picture:
            order = (drawn(len(self.layout(index)), self.seed, turn, index),)
        return self.caption(index, order)

    def sentence_of(self, index: int) -> int:
        """The number by which the words around the names are drawn."""
        return index

    def name(self, index: int) -> str:
        return str(index)

    def image_id(self, index: int) -> int:
        """A number that encodes which pictures the scene shows where: equal for equal images."""
        return sum((concept + 1) << 12 * place for concept, place in self.layout(index))

    def pair(self, index: int, picture: bool = True) -> Sample:
        """The sample without augmentation, with one caption.

        `picture` is ignored: drawing the image costs almost nothing.
        """
        return self._sample(index, self.caption(index))

    def _sample(self, index: int, text: Text) -> Sample:
        cell = self.pictures.cell
        image = np.full((3, self.size, self.size), 255, dtype=np.uint8)
        cell_picture = [NO_PICTURE] * 4
        for number, (concept, place) in enumerate(self.layout(index)):
            top, left = (cell * offset for offset in CORNERS[place])
            image[:, top : top + cell, left : left + cell] = self.pictures.images[concept]
            cell_picture[place] = number
        caption, spans = text
        tokens = self.tokenizer(caption)
        return Sample(
            torch.from_numpy(image),
            tokens,
            index,
            self.image_id(index),
            token_picture=spans_of_tokens(tokens, spans),
            cell_picture=cell_picture,
        )


def _reserved(layout: Layout) -> bool:
    # Sorted, because the caption's order is ignored.
    return zlib.crc32(repr(sorted(layout)).encode()) % RESERVED == 0
