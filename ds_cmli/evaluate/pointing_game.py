"""Pointing-game accuracy: how often the patch that fits a phrase best lies on what it names.

It follows Zhang et al., "Top-down Neural Attention by Excitation Backprop" (2016): a hit is a
maximum inside the box. It is measured on scenes, and on Flickr30k Entities (Plummer et al., 2015),
captions whose phrases have bounding boxes. Of the latter, `Sentences/ID.txt` has one caption per
line, such as `[/EN#5/people Two men] on [/EN#6/vehicles a boat]`, and `Annotations/ID.xml` has the
boxes of these entity numbers. Phrases without a box stay in the caption, unevaluated.

Shapes: N patches, F phrases of a caption.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from xml.etree import ElementTree

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ds_cmli.common.errors import UserError
from ds_cmli.config.schema import DataConfig
from ds_cmli.data.batch import Collate, Sample
from ds_cmli.data.images import PixelBox, View, black
from ds_cmli.data.pairs import NO_TOKEN, described, told
from ds_cmli.data.scenes import spans_of_tokens
from ds_cmli.data.tokens import CaptionTokenizer
from ds_cmli.distributed import process_group as distributed
from ds_cmli.evaluate.embed import EmbedSettings, Share, embed_share
from ds_cmli.evaluate.held_out import HeldOut
from ds_cmli.evaluate.metrics import patches_inside, phrase_hits
from ds_cmli.evaluate.report import Metrics

if TYPE_CHECKING:
    from ds_cmli.models.student import Student

SUFFIXES = (".jpg", ".jpeg", ".png")
PHRASE = re.compile(r"\[/EN#(\d+)\S* ([^\]]*)\]")


@dataclass
class Phrase:
    start: int  # first character in the caption
    end: int  # one after its last character
    number: str  # the number of its entity


def parse_sentence(line: str) -> tuple[str, list[Phrase]]:
    """The caption without its markup, and its phrases."""
    text, phrases, last = "", [], 0
    for match in PHRASE.finditer(line):
        text += line[last : match.start()]
        phrases.append(Phrase(len(text), len(text) + len(match[2]), match[1]))
        text += match[2]
        last = match.end()
    return text + line[last:], phrases


def parse_annotation(text: str) -> tuple[tuple[int, int], dict[str, list[PixelBox]]]:
    """Width and height of the picture, and the boxes of each entity that has any."""
    root = ElementTree.fromstring(text)
    boxes: dict[str, list[PixelBox]] = {}
    for item in root.iter("object"):
        box = item.find("bndbox")
        if box is not None:
            sides = ("xmin", "ymin", "xmax", "ymax")
            left, top, right, bottom = (float(box.findtext(side, "")) for side in sides)
            for name in item.findall("name"):
                boxes.setdefault(str(name.text), []).append((left, top, right, bottom))
    return (int(root.findtext("size/width", "")), int(root.findtext("size/height", ""))), boxes


@dataclass
class Caption:
    file: Path
    text: str
    phrases: list[Phrase]  # only those with boxes
    boxes: list[list[PixelBox]]  # the boxes of each phrase
    picture: int  # the number of its picture
    size: tuple[int, int]  # width and height of the picture


class Entities(Dataset):
    """A map-style data set of all captions that have a phrase with a box: `held_out.HeldOutPairs`.

    `Sample.token_picture` is here the index of the phrase of each token, -1 for none.
    """

    def __init__(
        self, folder: str, images: str, split: str, tokenizer: CaptionTokenizer, config: DataConfig
    ):
        """Read the pictures that `folder/SPLIT.txt` lists, or all annotated ones without lists.

        `split` "all" also reads all of them, unless there is an all.txt.

        Raises:
            UserError: the folder does not have this format, lacks the split's list, or has no
                phrase with a box.
        """
        self.tokenizer = tokenizer
        self.view, self.size = View.of(config), config.image_size
        root = Path(folder).expanduser()
        listed = root / f"{split}.txt"
        if not (root / "Annotations").is_dir() or not (root / "Sentences").is_dir():
            raise UserError(
                f"--boxes is {folder!r}: give Flickr30k Entities' folder, with Annotations/ and "
                "Sentences/"
            )
        lists = sorted(path.stem for path in root.glob("*.txt"))
        if listed.is_file():
            names = listed.read_text().split()
        elif lists and split != "all":
            raise UserError(
                f"--split is {split!r}: {folder} has the lists {', '.join(lists)}; 'all' takes "
                "every picture"
            )
        else:
            names = sorted(path.stem for path in (root / "Annotations").glob("*.xml"))
        self.captions: list[Caption] = []
        for number, name in enumerate(names):
            files = [Path(images).expanduser() / f"{name}{suffix}" for suffix in SUFFIXES]
            file = next(filter(Path.exists, files), files[0])
            self.captions += _read(root, file, name, number)
        if not self.captions:
            raise UserError(
                f"--boxes is {folder!r}: its {len(names)} pictures have no phrase with a box"
            )

    def __len__(self) -> int:
        return len(self.captions)

    def name(self, row: int) -> str:
        return self.captions[row].file.name

    def image_id(self, row: int) -> int:
        return self.captions[row].picture

    def pair(self, row: int, picture: bool = True) -> Sample:
        """The sample, even if it cannot be used: then `bad` says why. A missing picture is black.

        Without `picture` the file is not read.
        """
        caption = self.captions[row]
        tokens = self.tokenizer(caption.text)
        image, reason = black(self.size), None
        if picture:
            try:
                image = self.view(caption.file.read_bytes())
            except Exception as error:  # decoders raise nearly any exception for damaged files
                reason = described(error)
        if reason is None and not any(tokens.valid):
            reason = NO_TOKEN
        bad = None if reason is None else (self.name(row), reason)
        spans = [(phrase.start, phrase.end) for phrase in caption.phrases]
        phrase_of = spans_of_tokens(tokens, spans)
        return Sample(image, tokens, row, self.image_id(row), phrase_of, bad=bad)


def _read(root: Path, file: Path, name: str, number: int) -> list[Caption]:
    """The captions of picture `number` that have a phrase with a box."""
    annotation = root / "Annotations" / f"{name}.xml"
    sentences = root / "Sentences" / f"{name}.txt"
    try:
        size, boxes = parse_annotation(annotation.read_text(encoding="utf-8"))
        lines = sentences.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError, ElementTree.ParseError) as error:
        raise UserError(f"--boxes: {annotation} or its sentences cannot be read: {error}") from None
    out = []
    for line in lines:
        text, phrases = parse_sentence(line)
        phrases = [phrase for phrase in phrases if phrase.number in boxes]
        if phrases:
            of_phrases = [boxes[phrase.number] for phrase in phrases]
            out.append(Caption(file, text, phrases, of_phrases, number, size))
    return out


def pointing_game(student: "Student", entities: Entities, how: EmbedSettings) -> Metrics:
    """Measure whether the best patch of a phrase lies in one of its boxes. Collective.

    Returns:
        The same on every rank: `pointing_game`, the share of `phrases` with a hit;
        `chance/pointing_game`, that of a random patch; `visible`, the share of phrases with the
        centre of a patch in one of their boxes (the model sees only the central square of a
        picture, and a phrase outside of it counts as missed); `pictures`, their number; and if
        captions cannot be used, `left_out` (their number) and `left_out_first` (names of some).
    """
    held_out = HeldOut(entities)
    share = embed_share(student, held_out, Collate(entities.tokenizer), how)  # collective
    sums = torch.zeros(4, dtype=torch.float64)
    for _, of_caption in phrase_sums(share, entities):
        sums += of_caption
    hits, phrases, chance, visible = distributed.sum_over_ranks(sums).tolist()  # collective
    out: Metrics = {
        "pointing_game": hits / phrases,
        "chance/pointing_game": chance / phrases,
        "visible": visible / phrases,
        "phrases": int(phrases),
        "pictures": len(held_out.image_of[share.captions].unique()),
    }
    if share.left_out:
        out["left_out"] = len(held_out.image_of) - len(share.captions)
        out["left_out_first"] = told(share.left_out)
    return out


def phrase_sums(share: Share, entities: Entities) -> Iterator[tuple[int, Tensor]]:
    """Yield the number of each caption of the share, and four sums over its phrases, fp64 [4].

    Hits, phrases, the share of patches in their boxes, and phrases that have one there.
    """
    images, texts = share.images, share.texts
    for image, text in share.pair_rows():
        number = int(texts.number[text])
        caption = entities.captions[number]
        part, patches = entities.view.part(*caption.size), images.patches[image]
        of_phrases = [patches_inside(boxes, part, images.grid) for boxes in caption.boxes]
        inside = torch.stack(of_phrases)  # [F, N]
        tokens = texts.tokens_of(text)
        phrase = texts.token_picture[tokens]
        hits = phrase_hits(patches, texts.tokens[tokens], phrase, inside)
        chance, visible = inside.double().mean(1).sum(), inside.any(1).sum()
        sums = [hits.sum(), len(hits), chance, visible]
        yield number, torch.tensor(sums, dtype=torch.float64)
