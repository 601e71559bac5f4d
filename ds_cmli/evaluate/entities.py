"""Flickr30k Entities: captions whose phrases have bounding boxes (Plummer et al., 2015).

`Sentences/ID.txt` has one caption per line, such as `[/EN#5/people Two men] on [/EN#6/vehicles a boat]`, and
`Annotations/ID.xml` has the boxes of these entity numbers. Phrases without a box stay in the caption, unevaluated.
"""

import re
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from ds_cmli.common.errors import UserError
from ds_cmli.data.bad import NO_TOKEN, told
from ds_cmli.data.batch import NO_PICTURE, Sample
from ds_cmli.data.load import EvalData
from ds_cmli.data.pictures import decode
from ds_cmli.data.tokens import CaptionTokenizer, Tokens
from ds_cmli.data.transforms import central_square
from ds_cmli.distributed import process_group as distributed
from ds_cmli.evaluate.embed import pair_positions
from ds_cmli.evaluate.held_out import HeldOut
from ds_cmli.evaluate.pointing_game import patches_inside, phrase_hits
from ds_cmli.evaluate.split import embed_share

PHRASE = re.compile(r"\[/EN#(\d+)\S* ([^\]]*)\]")
SUFFIXES = (".jpg", ".jpeg", ".png")
Box = tuple[float, float, float, float]  # left, top, right, bottom, in pixels


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


def parse_annotation(text: str) -> tuple[tuple[int, int], dict[str, list[Box]]]:
    """Width and height of the picture, and the boxes of each entity that has any."""
    root = ElementTree.fromstring(text)
    boxes: dict[str, list[Box]] = {}
    for item in root.iter("object"):
        box = item.find("bndbox")
        if box is not None:
            left, top, right, bottom = (
                float(box.findtext(side, "")) for side in ("xmin", "ymin", "xmax", "ymax")
            )
            for name in item.findall("name"):
                boxes.setdefault(str(name.text), []).append((left, top, right, bottom))
    return (int(root.findtext("size/width", "")), int(root.findtext("size/height", ""))), boxes


@dataclass
class Caption:
    file: Path
    text: str
    phrases: list[Phrase]  # only those with boxes
    boxes: list[list[Box]]  # the boxes of each phrase
    picture: int  # the number of its picture
    size: tuple[int, int]  # width and height of the picture


class Entities(Dataset):
    """A map-style data set of all captions that have a phrase with a box, with the methods that `HeldOut` needs.

    `Sample.token_picture` is here the index of the phrase that each token belongs to, -1 for none.
    """

    def __init__(
        self,
        folder: str,
        images: str,
        split: str,
        tokenizer: CaptionTokenizer,
        size: int,
        max_pixels: int,
    ):
        """Read the pictures that `folder/SPLIT.txt` lists, or all annotated ones if `folder` has no lists.

        `split` "all" also reads all of them, unless there is an all.txt.

        Raises:
            UserError: the folder does not have this format, lacks the split's list, or has no phrase with a box.
        """
        self.tokenizer, self.size, self.max_pixels = tokenizer, size, max_pixels
        root, listed = Path(folder).expanduser(), Path(folder).expanduser() / f"{split}.txt"
        if not (root / "Annotations").is_dir() or not (root / "Sentences").is_dir():
            raise UserError(
                f"--boxes is {folder!r}: give Flickr30k Entities' folder, with Annotations/ and Sentences/"
            )
        if listed.is_file():
            names = listed.read_text().split()
        elif any(root.glob("*.txt")) and split != "all":
            found = ", ".join(sorted(path.stem for path in root.glob("*.txt")))
            raise UserError(
                f"--split is {split!r}: {folder} has the lists {found}; 'all' takes every picture"
            )
        else:
            names = sorted(path.stem for path in (root / "Annotations").glob("*.xml"))
        self.captions: list[Caption] = []
        for number, name in enumerate(names):
            self.captions += self._read(root, Path(images).expanduser(), name, number)
        if not self.captions:
            raise UserError(
                f"--boxes is {folder!r}: its {len(names)} pictures have no phrase with a box"
            )

    def _read(self, root: Path, images: Path, name: str, number: int) -> list[Caption]:
        annotation, sentences = (
            root / "Annotations" / f"{name}.xml",
            root / "Sentences" / f"{name}.txt",
        )
        try:
            size, boxes = parse_annotation(annotation.read_text(encoding="utf-8"))
            lines = sentences.read_text(encoding="utf-8").splitlines()
        except (OSError, ValueError, ElementTree.ParseError) as error:
            raise UserError(
                f"--boxes: {annotation} or its sentences cannot be read: {error}"
            ) from None
        file = next(
            (images / f"{name}{end}" for end in SUFFIXES if (images / f"{name}{end}").exists()),
            None,
        )
        file = file or images / f"{name}{SUFFIXES[0]}"
        out = []
        for line in lines:
            text, phrases = parse_sentence(line)
            phrases = [phrase for phrase in phrases if phrase.number in boxes]
            if phrases:
                out.append(
                    Caption(file, text, phrases, [boxes[p.number] for p in phrases], number, size)
                )
        return out

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
        image, reason = torch.zeros(3, self.size, self.size, dtype=torch.uint8), None
        if picture:
            try:
                image = decode(caption.file.read_bytes(), self.size, self.max_pixels)
            except FileNotFoundError:
                reason = "no such file"
            except Exception as error:  # decoders raise nearly any exception for damaged files
                reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if reason is None and not any(tokens.valid):
            reason = NO_TOKEN
        bad = None if reason is None else (self.name(row), reason)
        phrase = _phrase_of(tokens, caption.phrases)
        return Sample(image, tokens, row, self.image_id(row), token_picture=phrase, bad=bad)


def _phrase_of(tokens: Tokens, phrases: list[Phrase]) -> list[int]:
    def number(last: int) -> int:
        return next(
            (n for n, phrase in enumerate(phrases) if phrase.start < last <= phrase.end), NO_PICTURE
        )

    return [
        number(last) if valid else NO_PICTURE
        for last, valid in zip(tokens.ends, tokens.valid, strict=True)
    ]


def pointing_game(
    student: Any, entities: Entities, data: EvalData, batch_size: int, device: Any, workers: int = 0
) -> dict[str, Any]:
    """Measure pointing-game accuracy, the same on every rank. Collective.

    Returns:
        `pointing_game`, the share of `phrases` with a hit; `chance/pointing_game`, that of a random patch; `visible`,
        the share of phrases with the centre of a patch in one of their boxes (the model sees only the central square of
        a picture, and a phrase outside of it counts as missed); `pictures`, their number; and if captions cannot be
        used, `left_out` (their number) and `left_out_first` (the names of some).
    """
    held_out = HeldOut(entities)
    share = embed_share(student, held_out, data.collate, batch_size, device, workers)  # collective
    sums = torch.zeros(4, dtype=torch.float64)  # hits, phrases, chance, visible phrases
    for image, text in pair_positions(share.images, share.texts, held_out.image_of):
        caption = entities.captions[int(share.texts.number[text])]
        view = central_square(*caption.size)
        inside = torch.stack(
            [patches_inside(boxes, view, student.grid) for boxes in caption.boxes]
        )  # [F, N]
        tokens = share.texts.tokens_of(text)
        found = phrase_hits(
            share.images.patches[image],
            share.texts.tokens[tokens],
            share.texts.token_picture[tokens],
            inside,
        )
        chance = inside.double().mean(1).sum().item()
        sums += torch.tensor(
            [found.sum(), len(found), chance, inside.any(1).sum()], dtype=torch.float64
        )
    hits, phrases, chance, visible = distributed.sum_over_ranks(sums).tolist()  # collective
    out: dict[str, Any] = {
        "pointing_game": hits / phrases,
        "chance/pointing_game": chance / phrases,
    }
    pictures = held_out.image_of[share.captions].unique()
    out |= {"visible": visible / phrases, "phrases": int(phrases), "pictures": len(pictures)}
    if share.left_out:
        lost = len(held_out.image_of) - len(share.captions)
        out |= {"left_out": lost, "left_out_first": told(share.left_out)}
    return out
