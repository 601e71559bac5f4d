"""Pointing-game accuracy: how often the patch that fits a phrase best lies on what it names.

A hit is a maximum inside the box (Zhang et al., "Top-down Neural Attention by Excitation Backprop",
2016). Tokens of scenes each name a picture in a quarter; phrases of Flickr30k Entities (Plummer et
al., 2015) have boxes: a line of `Sentences/ID.txt` is a caption such as `[/EN#5/people Two men] on
[/EN#6/vehicles a boat]`, and `Annotations/ID.xml` has the boxes of these entity numbers.
"""

import os
import re
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import torch
import torch.nn.functional as F
from torch import Tensor

from ds_cmli.config.schema import DataConfig
from ds_cmli.data.images import View
from ds_cmli.data.scenes import Scenes, spans_of_tokens
from ds_cmli.data.tokens import CaptionTokenizer
from ds_cmli.distributed import process_group as distributed
from ds_cmli.errors import UserError, blame
from ds_cmli.evaluate.embed import Embedded, PictureFiles
from ds_cmli.evaluate.measures import patches_inside, phrase_hits
from ds_cmli.evaluate.summary import Metrics

SIDES = ("xmin", "ymin", "xmax", "ymax")
PHRASE = re.compile(r"\[/EN#(\d+)\S* ([^\]]*)\]")
PixelBox = tuple[float, float, float, float]  # left, top, right, bottom
Span = tuple[int, int]  # the first character, and the one after the last
Size = tuple[int, int]  # width and height, or rows and columns
# The phrase of each valid token, int64 [M], -1 for none, and the patches that show it, bool [F, N].
Regions = tuple[Tensor, Tensor]


def pointing_game(embedded: Embedded, regions: Callable[..., Regions], grid: Size) -> Metrics:
    """Return the share of `phrases` whose best patch shows what they name, and a random patch's.

    `visible` is the share of phrases that some patch of the central square shows. Collective.
    """
    sums = torch.zeros(4, dtype=torch.float64)
    for caption, text in embedded.texts.items():
        phrase, shown = regions(embedded.pairs, caption, grid)
        patches = embedded.images[embedded.image_of[caption]].parts
        hits = phrase_hits(patches, text.parts, phrase, shown)
        chance = shown.double().mean(1).sum()
        visible = shown.any(1).sum()
        sums += torch.tensor([hits.sum(), chance, visible, len(hits)], dtype=torch.float64)
    hits, chance, visible, phrases = distributed.sum_over_ranks(sums).tolist()  # collective
    counts = {"pointing_game": hits, "chance/pointing_game": chance, "visible": visible}
    return {name: n / max(phrases, 1) for name, n in counts.items()} | {"phrases": int(phrases)}


def scene_regions(scenes: Scenes, row: int, grid: Size) -> Regions:
    """Return each token of a scene that names a picture as a phrase, shown in a quarter."""
    token_picture, cell_picture = scenes.places(row)
    cells = torch.tensor(cell_picture).view(1, 1, 2, 2).float()
    picture_of_patch = F.interpolate(cells, size=grid, mode="nearest").flatten()
    picture = torch.tensor(token_picture)  # [M]
    is_phrase = picture >= 0
    phrase = torch.where(is_phrase, is_phrase.cumsum(0) - 1, -1)
    return phrase, picture_of_patch == picture[is_phrase, None]


def entity_regions(entities: "Entities", row: int, grid: Size) -> Regions:
    """Return a caption's phrases, and the patches whose centre lies in one of their boxes."""
    phrases, size = entities.phrases[row]
    _, text = entities.rows[row]
    phrase = spans_of_tokens(entities.tokenizer(text), [span for span, _ in phrases])
    view = entities.view.part(*size)
    shown = torch.stack([patches_inside(boxes, view, grid) for _, boxes in phrases])
    return torch.tensor(phrase), shown


class Entities(PictureFiles):
    """All captions with a box, of the pictures that `folder/SPLIT.txt` lists, or of all."""

    def __init__(
        self, folder: str, images: str, split: str, tokenizer: CaptionTokenizer, config: DataConfig
    ) -> None:
        super().__init__(View.of(config), [])
        self.tokenizer = tokenizer
        self.phrases: list[tuple[list[tuple[Span, list[PixelBox]]], Size]] = []  # of each caption
        root = Path(os.path.expanduser(folder))
        image_folder = Path(os.path.expanduser(images))
        lists = sorted(path.stem for path in root.glob("*.txt"))
        names = sorted(path.stem for path in root.glob("Annotations/*.xml"))
        if split in lists:
            names = (root / f"{split}.txt").read_text().split()
        elif lists and split != "all":
            raise UserError(f"--split is {split!r}: --boxes has {', '.join(lists)}, and 'all'")
        for name in names:
            with blame(f"--boxes is {folder!r}: picture {name} cannot be read"):
                size, boxes = parse_annotation(root / f"Annotations/{name}.xml")
                for line in (root / f"Sentences/{name}.txt").read_text("utf-8").splitlines():
                    text, spans = parse_sentence(line)
                    if phrases := [(span, boxes[name]) for span, name in spans if name in boxes]:
                        self.rows.append((image_folder / f"{name}.jpg", text))
                        self.phrases.append((phrases, size))
        if not self.rows:
            remedy = "give Flickr30k Entities' folder, with Annotations/ and Sentences/"
            raise UserError(f"--boxes is {folder!r}, without a phrase with a box: {remedy}")


def parse_sentence(line: str) -> tuple[str, list[tuple[Span, str]]]:
    """Return the caption without its markup, and the span and the entity of each phrase."""
    text, *parts = PHRASE.split(line)
    phrases = []
    for entity, words, text_after in zip(parts[::3], parts[1::3], parts[2::3], strict=True):
        phrases.append(((len(text), len(text) + len(words)), entity))
        text += words + text_after
    return text, phrases


def parse_annotation(file: Path) -> tuple[Size, dict[str, list[PixelBox]]]:
    """Return the picture's width and height, and the boxes of each entity that has any."""
    root = ElementTree.parse(file).getroot()
    boxes = defaultdict(list)
    for item in root.iter("object"):
        for box in item.iter("bndbox"):
            left, top, right, bottom = (float(box.findtext(side, "")) for side in SIDES)
            for name in item.iter("name"):
                boxes[str(name.text)].append((left, top, right, bottom))
    return (int(root.findtext("size/width", "")), int(root.findtext("size/height", ""))), boxes
