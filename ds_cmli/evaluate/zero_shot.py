"""Zero-shot classification: the class whose prompts fit a picture best, by global and CMLI scores.

A class's global embedding is the normalised mean over its prompts (Radford et al., 2021, section
3.1.4). Token embeddings of different prompts have no mean, so the CMLI scores of the prompts, from
the picture's side, are averaged (FILIP, arXiv 2111.07783, section 3.1).

Shapes: B pictures of a batch, C classes, T prompt templates, N patches, M text positions, H hidden
size, D embedding dimension; K kinds of scores (global, cmli, combined).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from ds_cmli.cmli import cmli_scores
from ds_cmli.common.errors import UserError, check_regular, first_line
from ds_cmli.common.json_text import parse
from ds_cmli.config.schema import DataConfig
from ds_cmli.data.batch import Bad
from ds_cmli.data.images import View, black
from ds_cmli.data.pairs import told
from ds_cmli.data.tokens import CaptionTokenizer
from ds_cmli.distributed import process_group as distributed
from ds_cmli.evaluate.embed import EmbedSettings, Texts, embed_listed
from ds_cmli.evaluate.held_out import FILLER, NumberedView, Picture, PictureBatch
from ds_cmli.evaluate.metrics import TOP, accuracies_by_class, top_chances, top_hits
from ds_cmli.evaluate.report import Metrics, prefixed
from ds_cmli.evaluate.retrieval import kinds
from ds_cmli.scores import combined

if TYPE_CHECKING:
    from ds_cmli.losses.objective import Objective
    from ds_cmli.models.student import Student

# Seven of OpenAI's eighty prompt templates for ImageNet, which OpenAI found to work about as well
# as all eighty.
TEMPLATES = (
    "itap of a {}.",
    "a bad photo of the {}.",
    "a origami {}.",
    "a photo of the large {}.",
    "a {} in a video game.",
    "art of the {}.",
    "a photo of the small {}.",
)
CLASSES = 64  # number of classes that are scored at a time


class ClassPictures:
    """The pictures of a folder of class folders, or of another of timm's readers.

    These read a tar of class folders, or a Hugging Face data set with labels.

    Attributes:
        folders: the class names in the data, in the order of the class numbers.
    """

    def __init__(self, source: str, config: DataConfig):
        """Open `source`: a folder, a .tar, or the validation part of "hfds/NAME", as timm names it.

        Raises:
            UserError: `source` is none of these, cannot be read, or has no picture or only a class.
        """
        self.view, self.size = View.of(config), config.image_size
        where, path = f"--zero-shot is {source!r}", Path(source).expanduser()
        if not path.exists() and not source.startswith("hfds/"):
            raise UserError(
                f"{where}: give a folder that has a folder of pictures for each class, or hfds/NAME"
            )
        from timm.data.readers import create_reader

        try:
            name, root = ("", str(path)) if path.exists() else (source, None)
            self.reader = create_reader(name, root=root, split="validation")
        except Exception as error:  # each of timm's readers raises its own exceptions
            raise UserError(f"{where}, which timm cannot read: {first_line(error)}") from None
        numbers = self.reader.class_to_idx
        self.folders = list(map(str, sorted(numbers, key=numbers.__getitem__)))
        if len(self.folders) < 2 or not len(self.reader):
            raise UserError(
                f"{where}, with {len(self.folders)} classes and {len(self.reader)} pictures: give "
                "at least 2"
            )

    def __len__(self) -> int:
        return len(self.reader)

    def pictures(self, numbers: Sequence[int]) -> Dataset:
        """A data set of `Picture`s with their classes; broken pictures and `FILLER` are black."""
        return NumberedView(self._picture, numbers)

    def _picture(self, number: int) -> Picture:
        if number == FILLER:
            return Picture(black(self.size), FILLER)
        try:
            # Readers of archives give names that are no paths here.
            path = self.reader.filename(number, absolute=True) or f"picture {number}"
            check_regular("a picture", Path(str(path)))
            file, target = self.reader[number]
            with file:
                image = self.view(file.read())
            return Picture(image, number, target=int(target))
        except Exception as error:  # decoders raise nearly any exception for damaged files
            name = self.reader.filename(number, basename=True)
            name = str(name or f"picture {number}")  # parquet rows may have no name
            return Picture(black(self.size), number, bad=(name, first_line(error)))


def class_names(folders: list[str], file: str | None) -> list[str]:
    """The names of the classes for the prompts.

    These are the folder names with blanks for underscores, or those in `file`.

    Args:
        file: a JSON object {"folder": "name"}, or a text file with one name per line in the order
            of `folders`.

    Raises:
        UserError: the file cannot be read, or lacks a class.
    """
    if file is None:
        return [folder.replace("_", " ") for folder in folders]
    try:
        text = Path(file).read_text(encoding="utf-8")
        names: object = text.splitlines()
        if file.endswith(".json"):
            names = parse(text, object)
    except (OSError, ValueError) as error:
        raise UserError(f"--class-names is {file!r}, which cannot be read: {error}") from None
    if isinstance(names, dict):
        missing = [folder for folder in folders if not isinstance(names.get(folder), str)]
        if missing:
            raise UserError(f"--class-names is {file!r}: it has no name for {missing[0]!r}")
        return [names[folder] for folder in folders]
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f'--class-names is {file!r}: give {{"folder": "name"}}, or a list of names')
    names = list(filter(str.strip, names))
    if len(names) != len(folders):
        raise UserError(
            f"--class-names is {file!r}, with {len(names)} names: there are {len(folders)} classes"
        )
    return names


def prompt_templates(file: str | None) -> list[str]:
    """`TEMPLATES`, or the lines of a file, each with one {} for the class name.

    Raises `UserError`.
    """
    if file is None:
        return list(TEMPLATES)
    try:
        text = Path(file).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"--templates is {file!r}, which cannot be read: {error}") from None
    lines = list(filter(None, map(str.strip, text.splitlines())))
    for line in lines or [""]:
        if line.count("{}") != 1:
            raise UserError(
                f"--templates is {file!r}, with the line {line!r}: write {{}} once where the "
                "class's name goes"
            )
    return lines


def filled(names: Sequence[str], templates: Sequence[str]) -> list[str]:
    """The prompts of all names, those of a name after one another."""
    return [template.replace("{}", name) for name in names for template in templates]


@dataclass
class Classifier:
    """The embedded prompts of all classes: prompt t of class c is caption c * T + t of `texts`."""

    texts: Texts
    templates: int  # T
    scales: dict[str, float]  # 1/temperature of each kind of scores: `Objective.score_scales`

    def __post_init__(self):
        prompts = self.texts.cls.view(-1, self.templates, self.texts.cls.shape[1])  # [C, T, H]
        self.cls = F.normalize(prompts.mean(1), dim=-1)  # [C, H]

    def __call__(self, image_cls: Tensor, patches: Tensor) -> Tensor:
        """Score pictures with all classes: fp32 [B, H], [B, N, D] -> fp32 [K, B, C]."""
        by_global = image_cls @ self.cls.to(image_cls.device).t()
        if "cmli" not in self.scales:
            return by_global[None]
        of_prompts = []
        for prompts in torch.arange(len(self.texts.number)).split(CLASSES * self.templates):
            _, tokens, mask = (x.to(patches.device) for x in self.texts.block(prompts))
            of_prompts.append(cmli_scores(patches, tokens, mask)[0])  # [B, classes * T]
        of_classes = torch.cat(of_prompts, 1).unflatten(1, (-1, self.templates))
        scores = {"global": by_global, "cmli": of_classes.mean(2)}  # [B, C] each
        return torch.stack([*scores.values(), combined(scores, self.scales)])


@dataclass
class Hits:
    """What `metrics.top_hits` finds for r pictures that could be read."""

    top: Tensor  # fp64 [len(TOP), K, r]
    target: Tensor  # int64 [r], their classes
    broken: dict[int, Bad]  # the other pictures, by number


@torch.no_grad()
def picture_hits(
    student: "Student", loader: Iterable[PictureBatch], classifier: Classifier, how: EmbedSettings
) -> Hits:
    """Classify the pictures of a loader, in their order, which has as many batches on each rank."""
    hits, targets = [], []
    broken: dict[int, Bad] = {}
    for batch in loader:
        how.heartbeat()
        broken |= batch.broken
        cls, patches = student.image_embeddings(batch.image.to(how.device, non_blocking=True))
        class_scores = classifier(cls, patches).cpu()  # CPU-GPU sync
        usable = batch.usable()
        targets.append(batch.target[usable])
        hits.append(top_hits(class_scores[:, usable], targets[-1]))
    return Hits(torch.cat(hits, 2), torch.cat(targets), broken)


def classify(
    student: "Student", loader: Iterable[PictureBatch], classifier: Classifier, how: EmbedSettings
) -> Metrics:
    """Measure accuracies over the pictures of all ranks. Collective.

    Args:
        loader: yields batches of this rank with the pictures' classes, as many on every rank.

    Returns:
        `<score>/top1`, `<score>/top5`, `<score>/mean_per_class` (top 1 averaged over the classes
        that have pictures), `chance/top1`, `chance/top5`, `pictures`, `classes`, and if pictures
        could not be read `left_out` (their number) and `left_out_first` (the names of some).
    """
    scores, classes = kinds(classifier.scales), len(classifier.cls)
    own = picture_hits(student, loader, classifier, how)
    hits = torch.zeros(len(TOP), len(scores), classes, dtype=torch.float64)
    hits.index_add_(2, own.target, own.top)
    counts = own.target.bincount(minlength=classes).double()
    distributed.sum_over_ranks(hits)  # collective
    distributed.sum_over_ranks(counts)  # collective
    out: Metrics = {"pictures": int(counts.sum()), "classes": classes}
    lost: list[Bad] = []
    for of_rank in distributed.gather_objects(own.broken):  # collective
        lost += of_rank.values()
    if not out["pictures"]:
        raise UserError(
            f"--zero-shot: no picture can be read, for instance {', '.join(told(lost))}"
        )
    if lost:
        out |= {"left_out": len(lost), "left_out_first": told(lost)}
    for k, score in enumerate(scores):
        out |= prefixed(f"{score}/", accuracies_by_class(hits[:, k], counts))
    return out | top_chances(classes)


@torch.no_grad()
def build_classifier(
    objective: "Objective",
    tokenizer: CaptionTokenizer,
    names: list[str],
    templates: list[str],
    how: EmbedSettings,
) -> Classifier:
    """Embed the prompts, of which each rank embeds a share. Collective.

    Raises:
        UserError: a prompt has no valid token.
    """
    scales = objective.score_scales()  # collective under ZeRO-3
    prompts = filled(names, templates)
    # One range of the prompts a rank, so that those of all ranks follow each other in order.
    count = -(-len(prompts) // distributed.world_size())
    first = distributed.rank() * count
    own = list(range(first, min(len(prompts), first + count)))
    own += [FILLER] * (count - len(own))
    embedded = embed_listed(objective.student, tokenizer, prompts, own, how)
    parts, without = zip(*distributed.gather_objects(embedded), strict=True)  # collective
    empty = list(chain.from_iterable(without))
    if empty:
        raise UserError(
            f"the prompt {prompts[empty[0]]!r} has no token: give the class a name in --class-names"
        )
    columns = []
    for field in fields(Texts):
        columns.append(torch.cat([getattr(part, field.name) for part in parts]))
    return Classifier(Texts(*columns), len(templates), scales)
