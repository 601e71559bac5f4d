"""Pointing-game accuracy: how often the patch that fits a phrase best lies on what it names.

It follows Zhang et al., "Top-down Neural Attention by Excitation Backprop" (2016): a hit is a
maximum inside the box. It is measured on scenes, whose tokens each name a picture in a quarter, and
on Flickr30k Entities (Plummer et al., 2015), captions whose phrases have bounding boxes. Of the
latter, `Sentences/ID.txt` has one caption per line, such as `[/EN#5/people Two men] on
[/EN#6/vehicles a boat]`, and `Annotations/ID.xml` has the boxes of these entity numbers.

Shapes: N patches, M valid tokens and F phrases of a caption.
"""

import re
from collections.abc import Callable
from itertools import compress
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch
import torch.nn.functional as F
from torch import Tensor

from ds_cmli.common.errors import UserError, blame
from ds_cmli.config.schema import DataConfig
from ds_cmli.data.images import PixelBox, View
from ds_cmli.data.scenes import Scenes, spans_of_tokens
from ds_cmli.data.tokens import CaptionTokenizer
from ds_cmli.distributed import process_group as distributed
from ds_cmli.evaluate.embed import Embedded, Files
from ds_cmli.evaluate.metrics import patches_inside, phrase_hits
from ds_cmli.evaluate.report import Metrics

PHRASE = re.compile(r"\[/EN#(\d+)\S* ([^\]]*)\]")
Span = tuple[int, int]  # the first character, and the one after the last
Grid = tuple[int, int]  # rows and columns of patches
# Of a data set and the number of a caption: the phrase of each valid token, int64 [M], -1 for none,
# and the patches that show each phrase, bool [F, N].
Regions = Callable[[Any, int, Grid], tuple[Tensor, Tensor]]


def pointing_game(own: Embedded, regions: Regions, grid: Grid) -> Metrics:
    """Measure whether the best patch of a phrase lies on what it names. Collective.

    Returns:
        `pointing_game`, the share of `phrases` with a hit; `chance/pointing_game`, that of a random
        patch; `visible`, the share of phrases that a patch shows (the model sees only the central
        square of a picture, and a phrase outside of it counts as missed).
    """
    sums = torch.zeros(4, dtype=torch.float64)
    for caption, (_, tokens) in own.texts.items():
        phrase, inside = regions(own.pairs, caption, grid)
        hits = phrase_hits(own.images[own.image_of[caption]][1], tokens, phrase, inside)
        chance, visible = inside.double().mean(1).sum(), inside.any(1).sum()
        sums += torch.tensor([hits.sum(), chance, visible, len(hits)], dtype=torch.float64)
    *shares, phrases = distributed.sum_over_ranks(sums).tolist()  # collective
    names = ("pointing_game", "chance/pointing_game", "visible")
    out = {name: total / max(phrases, 1) for name, total in zip(names, shares, strict=True)}
    return {**out, "phrases": int(phrases)}


def quarters(scenes: Scenes, row: int, grid: Grid) -> tuple[Tensor, Tensor]:
    """Each token of a scene that names a picture is a phrase of its own, shown in a quarter."""
    sample = scenes.pair(row)
    cells = torch.tensor(sample.cell_picture).view(1, 1, 2, 2).float()
    picture_of_patch = F.interpolate(cells, size=grid, mode="nearest").flatten()
    picture = torch.tensor(list(compress(sample.token_picture, sample.tokens.valid)))  # [M]
    named = picture >= 0
    return torch.where(named, named.cumsum(0) - 1, -1), picture_of_patch == picture[named, None]


def boxes(entities: "Entities", row: int, grid: Grid) -> tuple[Tensor, Tensor]:
    """The phrases of a caption, and the patches whose centre lies in one of their boxes."""
    (spans, boxes), size = entities.phrases[row], entities.sizes[row]
    tokens = entities.tokenizer(entities.text(row))
    part = entities.view.part(*size)
    inside = [patches_inside(of_phrase, part, grid) for of_phrase in boxes]
    phrase = compress(spans_of_tokens(tokens, spans), tokens.valid)
    return torch.tensor(list(phrase)), torch.stack(inside)


class Entities(Files):
    """All captions of Flickr30k Entities that have a phrase with a box.

    Of the pictures that `folder/SPLIT.txt` lists; of all for "all", and where there are no lists.
    """

    def __init__(
        self, folder: str, images: str, split: str, tokenizer: CaptionTokenizer, config: DataConfig
    ) -> None:
        super().__init__(View.of(config), [])
        self.tokenizer, root = tokenizer, Path(folder).expanduser()
        self.phrases: list[tuple[list[Span], list[list[PixelBox]]]] = []  # of each caption
        self.sizes: list[tuple[int, int]] = []  # of each caption's picture, width and height
        lists = sorted(path.stem for path in root.glob("*.txt"))
        names = sorted(path.stem for path in (root / "Annotations").glob("*.xml"))
        if split in lists:
            names = (root / f"{split}.txt").read_text().split()
        elif lists and split != "all":
            raise UserError(f"--split is {split!r}: --boxes has {', '.join(lists)}, and 'all'")
        for name in names:
            with blame(f"--boxes is {folder!r}: picture {name} cannot be read"):
                self._read(root, Path(images).expanduser(), name)
        if not self.rows:
            raise UserError(
                f"--boxes is {folder!r}: no phrase with a box: give Flickr30k Entities' folder, "
                "with Annotations/ and Sentences/"
            )

    def _read(self, root: Path, images: Path, name: str) -> None:
        annotation = (root / "Annotations" / f"{name}.xml").read_text(encoding="utf-8")
        size, boxes = parse_annotation(annotation)
        files = [images / f"{name}{suffix}" for suffix in (".jpg", ".jpeg", ".png")]
        file = next(filter(Path.exists, files), files[0])
        for line in (root / "Sentences" / f"{name}.txt").read_text(encoding="utf-8").splitlines():
            text, phrases = parse_sentence(line)
            known = [(span, boxes[entity]) for span, entity in phrases if entity in boxes]
            if known:
                self.rows.append((file, text))
                self.phrases.append(([span for span, _ in known], [box for _, box in known]))
                self.sizes.append(size)


def parse_sentence(line: str) -> tuple[str, list[tuple[Span, str]]]:
    """The caption without its markup, and the span and the entity of each phrase."""
    text, *parts = PHRASE.split(line)
    phrases = []
    for entity, words, after in zip(parts[::3], parts[1::3], parts[2::3], strict=True):
        phrases.append(((len(text), len(text) + len(words)), entity))
        text += words + after
    return text, phrases


def parse_annotation(text: str) -> tuple[tuple[int, int], dict[str, list[PixelBox]]]:
    """Width and height of the picture, and the boxes of each entity that has any."""
    root = ElementTree.fromstring(text)
    boxes: dict[str, list[PixelBox]] = {}
    for item in root.iter("object"):
        if (box := item.find("bndbox")) is not None:
            sides = ("xmin", "ymin", "xmax", "ymax")
            left, top, right, bottom = (float(box.findtext(side, "")) for side in sides)
            for name in item.findall("name"):
                boxes.setdefault(str(name.text), []).append((left, top, right, bottom))
    return (int(root.findtext("size/width", "")), int(root.findtext("size/height", ""))), boxes
