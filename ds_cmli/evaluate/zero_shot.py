"""Pictures with class labels for zero-shot classification: a folder of class folders, or another of timm's readers."""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from ds_cmli.cmli import cmli_scores
from ds_cmli.cmli.pair_scores import combined
from ds_cmli.common.cli import say
from ds_cmli.common.errors import UserError
from ds_cmli.data.bad import told
from ds_cmli.data.batch import Sample
from ds_cmli.data.loaders import batches
from ds_cmli.data.pictures import decode
from ds_cmli.data.tokens import tell_cut
from ds_cmli.distributed import process_group as distributed
from ds_cmli.evaluate.embed import Texts, embed_texts, image_embeddings
from ds_cmli.evaluate.held_out import FILLER, Picture, View
from ds_cmli.evaluate.retrieval import expected_hits, names

# Seven of OpenAI's eighty prompt templates for ImageNet, which OpenAI found to work about as well as all eighty.
TEMPLATES = (
    "itap of a {}.",
    "a bad photo of the {}.",
    "a origami {}.",
    "a photo of the large {}.",
    "a {} in a video game.",
    "art of the {}.",
    "a photo of the small {}.",
)


class ClassPictures:
    """The pictures of a folder of class folders, of a tar of class folders, or of a Hugging Face data set with labels.

    Attributes:
        folders: the class names in the data, in the order of the class numbers.
    """

    def __init__(self, source: str, size: int, max_pixels: int, split: str = "validation"):
        """Open `source`: a folder, a .tar, or "hfds/NAME" in timm's notation, of which `split` is read.

        Raises:
            UserError: `source` is none of these, cannot be read, or has no picture or fewer than two classes.
        """
        self.size, self.max_pixels = size, max_pixels
        where, path = f"--zero-shot is {source!r}", Path(source).expanduser()
        if not path.exists() and not source.startswith("hfds/"):
            raise UserError(
                f"{where}: give a folder that has a folder of pictures for each class, or hfds/NAME"
            )
        from timm.data.readers import create_reader

        try:
            name, root = ("", str(path)) if path.exists() else (source, None)
            self.reader: Any = create_reader(name, root=root, split=split)
        except Exception as error:  # each of timm's readers raises its own exceptions
            reason = (str(error) or type(error).__name__).strip().splitlines()[0]
            raise UserError(f"{where}, which timm cannot read: {reason}") from None
        numbers = self.reader.class_to_idx
        self.folders = [str(name) for name, _ in sorted(numbers.items(), key=lambda item: item[1])]
        if len(self.folders) < 2 or not len(self.reader):
            raise UserError(
                f"{where}, with {len(self.folders)} classes and {len(self.reader)} pictures: give at least 2"
            )

    def __len__(self) -> int:
        return len(self.reader)

    def pictures(self, numbers: Sequence[int]) -> Dataset:
        """A data set of `Picture`s with their classes; broken pictures and `FILLER` are black."""
        return View(self._picture, numbers)

    def _picture(self, number: int) -> Picture:
        black = torch.zeros(3, self.size, self.size, dtype=torch.uint8)
        if number == FILLER:
            return Picture(black, FILLER)
        try:
            file, target = self.reader[number]
            with file:
                return Picture(
                    decode(file.read(), self.size, self.max_pixels), number, target=int(target)
                )
        except Exception as error:  # decoders raise nearly any exception for damaged files
            reason = str(error).strip().splitlines() or [type(error).__name__]
            name = (
                self.reader.filename(number, basename=True) or f"picture {number}"
            )  # parquet rows may have no name
            return Picture(black, number, bad=(str(name), reason[0]))


def class_names(folders: list[str], file: str | None) -> list[str]:
    """The names of the classes for the prompts: the folder names with blanks for underscores, or those in `file`.

    Args:
        file: a JSON object {"folder": "name"}, or a text file with one name per line in the order of `folders`.

    Raises:
        UserError: the file cannot be read, or lacks a class.
    """
    if file is None:
        return [folder.replace("_", " ") for folder in folders]
    try:
        text = Path(file).read_text(encoding="utf-8")
        names = json.loads(text) if file.endswith(".json") else text.splitlines()
    except (OSError, ValueError) as error:
        raise UserError(f"--class-names is {file!r}, which cannot be read: {error}") from None
    if isinstance(names, dict):
        missing = [folder for folder in folders if not isinstance(names.get(folder), str)]
        if missing:
            raise UserError(f"--class-names is {file!r}: it has no name for {missing[0]!r}")
        return [names[folder] for folder in folders]
    names = [str(name) for name in names if str(name).strip()]
    if len(names) != len(folders):
        raise UserError(
            f"--class-names is {file!r}, with {len(names)} names: there are {len(folders)} classes"
        )
    return names


def prompt_templates(file: str | None) -> list[str]:
    """`TEMPLATES`, or the lines of a file, each with one {} for the class name; raises `UserError`."""
    if file is None:
        return list(TEMPLATES)
    try:
        lines = [
            line.strip()
            for line in Path(file).read_text(encoding="utf-8").splitlines()
            if line.strip()
        ]
    except (OSError, ValueError) as error:
        raise UserError(f"--templates is {file!r}, which cannot be read: {error}") from None
    wrong = next((line for line in lines if line.count("{}") != 1), None if lines else "")
    if wrong is not None:
        raise UserError(
            f"--templates is {file!r}, with the line {wrong!r}: write {{}} once where the class's name goes"
        )
    return lines


TOP = (1, 5)
CLASSES = 64  # number of classes that are scored at a time
TEXT_FIELDS = ("number", "cls", "tokens", "token_picture", "length")


@dataclass
class Classifier:
    """The embedded prompts of all classes: prompt t of class c is caption c * T + t of `texts`."""

    texts: Texts
    templates: int  # T
    scales: dict[str, float]  # 1/temperature for each kind of scores, from `Objective.score_scales`

    def __post_init__(self):
        prompts = self.texts.cls.view(-1, self.templates, self.texts.cls.shape[1])  # [C, T, H]
        self.cls = F.normalize(prompts.mean(1), dim=-1)  # [C, H]

    def __call__(self, image_cls: Tensor, patches: Tensor) -> Tensor:
        """Scores of pictures with all classes: fp32 [B, H], [B, N, D] -> fp32 [K, B, C] on the same device."""
        by_global = image_cls @ self.cls.to(image_cls.device).t()
        if "cmli" not in self.scales:
            return by_global[None]
        parts = []
        for classes in torch.arange(len(self.cls)).split(CLASSES):
            prompts = torch.arange(
                int(classes[0]) * self.templates, (int(classes[-1]) + 1) * self.templates
            )
            _, tokens, mask = (x.to(patches.device) for x in self.texts.block(prompts))
            i2t, _ = cmli_scores(patches, tokens, mask)  # [B, classes * T]
            parts.append(i2t.view(len(i2t), -1, self.templates).mean(2))
        cmli = torch.cat(parts, 1)  # [B, C]
        scores = {"global": by_global, "cmli": cmli}
        return torch.stack([*scores.values(), combined(scores, self.scales)])


def top_hits(scores: Tensor, target: Tensor) -> Tensor:
    """Whether the right class is among the first k, for each k of `TOP`: fp64 [len(TOP), K, B], a probability if tied.

    Args:
        scores: [K, B, C]; a right class with NaN is no hit, and a wrong class with NaN counts as higher.
        target: int64 [B], the right classes.
    """
    right = scores.gather(2, target.expand(len(scores), -1)[:, :, None])  # [K, B, 1]
    above = (~(scores <= right)).sum(2).double()
    equal = (scores == right).sum(2).double()  # includes the right class, unless it is NaN
    return torch.stack(
        [expected_hits(above, (equal - 1).clamp(min=0), equal.clamp(max=1), k) for k in TOP]
    )


@torch.no_grad()
def classify(
    student: Any,
    loader: Iterable,
    classifier: Classifier,
    device: Any,
    heartbeat: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Measure accuracies over the pictures of all ranks. Collective.

    Args:
        loader: yields `PictureBatch`es of this rank with the pictures' classes, as many on every rank.

    Returns:
        `<score>/top1`, `<score>/top5`, `<score>/mean_per_class` (top 1 averaged over the classes that have pictures),
        `chance/top1`, `chance/top5`, `pictures`, `classes`, and if pictures could not be read `left_out` (their
        number) and `left_out_first` (the names of some).
    """
    kinds, classes = names(classifier.scales), len(classifier.cls)
    hits = torch.zeros(len(TOP), len(kinds), classes, dtype=torch.float64)
    counts = torch.zeros(classes, dtype=torch.float64)
    broken: dict[int, Any] = {}
    for batch in loader:
        heartbeat()
        broken |= batch.broken
        scores = classifier(
            *image_embeddings(student, batch.image.to(device, non_blocking=True))
        ).cpu()  # CPU-GPU sync
        good = torch.tensor(
            [number >= 0 and number not in batch.broken for number in batch.number.tolist()]
        )
        target = batch.target[good]
        hits.index_add_(2, target, top_hits(scores[:, good], target))
        counts += target.bincount(minlength=classes)
    hits, counts = (
        distributed.sum_over_ranks(hits),
        distributed.sum_over_ranks(counts),
    )  # collective
    out: dict[str, Any] = {"pictures": int(counts.sum()), "classes": classes}
    lost = [
        bad for found in distributed.gather_objects(broken) for bad in found.values()
    ]  # collective
    if lost:
        out |= {"left_out": len(lost), "left_out_first": told(lost)}
    shown = counts > 0
    for k, kind in enumerate(kinds):
        for n, of_class in zip(TOP, hits[:, k], strict=True):
            out[f"{kind}/top{n}"] = (of_class.sum() / counts.sum()).item()
        out[f"{kind}/mean_per_class"] = (hits[0, k, shown] / counts[shown]).mean().item()
    return out | {f"chance/top{n}": min(1.0, n / classes) for n in TOP}


@torch.no_grad()
def build_classifier(
    objective: Any, data: Any, names: list[str], templates: list[str], batch_size: int, device: Any
) -> Classifier:
    """Embed the prompts, of which each rank embeds a share. Collective.

    Raises:
        UserError: a prompt has no valid token.
    """
    scales = objective.score_scales()  # collective under ZeRO-3
    rank, ranks = distributed.rank(), distributed.world_size()
    prompts = [template.replace("{}", name) for name in names for template in templates]
    say(tell_cut(prompts, data.tokenizer.positions))
    share = -(-len(prompts) // ranks)
    own = list(range(rank * share, min(len(prompts), (rank + 1) * share)))
    own += [FILLER] * (share - len(own))

    def prompt(number: int) -> Sample:
        return Sample(
            torch.zeros(3, 0, 0, dtype=torch.uint8),
            data.tokenizer(prompts[number]),
            number,
            image_id=0,
        )

    texts, empty = embed_texts(
        objective.student, batches(View(prompt, own), batch_size, 0, data.collate), device
    )
    everywhere = distributed.gather_objects((texts, empty))  # collective
    without = [number for _, found in everywhere for number in found]
    if without:
        raise UserError(
            f"the prompt {prompts[without[0]]!r} has no token: give the class a name in --class-names"
        )
    parts = [found for found, _ in everywhere]
    whole = Texts(*(torch.cat([getattr(part, name) for part in parts]) for name in TEXT_FIELDS))
    return Classifier(whole, len(templates), scales)
