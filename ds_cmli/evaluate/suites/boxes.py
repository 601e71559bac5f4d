"""Classes of boxes: the class whose text fits the mean patch of a box best, as FG-CLIP reports.

FG-CLIP (Xie et al., ICML 2025) and CLIPSelf (Wu et al., ICLR 2024) pool the patches of each true
box by RoIAlign; here each counts by its overlap with the box. COCO's and LVIS's files are read:
`{"images": [{"id", "width", "height", "file_name" or "coco_url"}], "categories": [{"id", "name"}],
"annotations": [{"image_id", "category_id", "bbox": [left, top, width, height]}]}`.

Shapes: n pictures, F boxes of a picture, C classes.
"""

import dataclasses
from functools import cached_property
from pathlib import Path

import torch
from pydantic.dataclasses import dataclass

from ds_cmli.common.errors import UserError
from ds_cmli.common.lists import json_object
from ds_cmli.config.schema import STRICT
from ds_cmli.data.coco_boxes import Annotation, CocoBoxes
from ds_cmli.data.transforms import PixelBox
from ds_cmli.evaluate.metrics import TOP, top_chances, top_hits
from ds_cmli.evaluate.model import EvaluatedModel
from ds_cmli.evaluate.suites.class_texts import Templates, class_vectors, prompts
from ds_cmli.evaluate.suites.dense import parts, pooled, seeing_whole
from ds_cmli.evaluate.suites.masks import picture_size
from ds_cmli.evaluate.suites.task import Measure, Measured

ROUNDED = 1.0  # pixels by which a box may exceed its picture


@dataclasses.dataclass
class Boxed:
    """A picture with its boxes, and the class of each."""

    file: Path
    size: tuple[int, int]  # width and height
    boxes: list[PixelBox] = dataclasses.field(default_factory=list)
    classes: list[int] = dataclasses.field(default_factory=list)


@dataclass(config=STRICT, frozen=True)
class Boxes:
    annotations: Path  # the JSON file
    images: Path  # the folder of the pictures, or of the folders that `coco_url` names
    templates: Templates = "openai"

    def read(self) -> None:
        """Read the file, and the size of each picture. Raises `UserError`."""
        _ = self.content, prompts(self.templates)

    @cached_property
    def content(self) -> tuple[list[str], list[Boxed]]:
        """The names of the classes, and the pictures that have boxes. Raises `UserError`."""
        coco = CocoBoxes(json_object(self.annotations))
        pictures: dict[int, Boxed] = {}
        for number, picture in coco.pictures.items():
            pictures[number] = Boxed(self._file(picture.name), picture.size)
        for annotation in coco.annotations():
            boxed = pictures[annotation.picture]
            boxed.boxes.append(_inside(annotation, boxed.size))
            boxed.classes.append(annotation.label)
        shown = [boxed for boxed in pictures.values() if boxed.boxes]
        if not shown:
            raise UserError(f"{self.annotations} has no box: fetch it again, or name another")
        for boxed in shown:
            size = picture_size(boxed.file)
            if size != boxed.size:
                raise UserError(
                    f"the picture {boxed.file} has {size[0]} x {size[1]} pixels, and in "
                    f"{self.annotations} {boxed.size[0]} x {boxed.size[1]}: fetch it again"
                )
        return coco.names, shown

    def _file(self, name: str) -> Path:
        """The picture's file, which LVIS names by the address of COCO's."""
        if "://" not in name:
            return self.images / name
        *_, folder, name = name.split("/")
        file = self.images / folder / name
        return file if file.is_file() else self.images / name

    @torch.no_grad()
    def run(self, model: EvaluatedModel) -> Measured:
        """Classify all boxes: `<score>/top1`, `<score>/top5`, and `<score>/mean_per_class`.

        The last is top 1 averaged over the classes that have boxes.
        """
        names, pictures = self.content
        vectors = class_vectors(model, names, prompts(self.templates))
        weights = torch.stack([*vectors.values()])  # [K, C, D]
        hits = torch.zeros(len(pictures), len(TOP), len(weights), len(names), dtype=torch.float64)
        counts = torch.zeros(len(pictures), len(names), dtype=torch.float64)
        shown = parts(seeing_whole(model), [(each.file, (0, 0, *each.size)) for each in pictures])
        for row, (picture, part) in enumerate(zip(pictures, shown, strict=True)):
            patches = part.patches.to(weights.device)
            features = pooled(patches, part.grid, picture.size, picture.boxes)
            scores = (features @ weights.mT).cpu()  # [K, F, C]; CPU-GPU sync
            classes = torch.tensor(picture.classes)
            hits[row].index_add_(2, classes, top_hits(scores, classes))
            counts[row] = classes.bincount(minlength=len(names))
        measures = {}
        for number, kind in enumerate(vectors):
            of_kind = hits[:, :, number]
            for top, of_top in zip(TOP, of_kind.unbind(1), strict=True):
                sums = of_top.sum(1, keepdim=True), counts.sum(1, keepdim=True)
                measures[f"{kind}/top{top}"] = Measure(*sums)
            measures[f"{kind}/mean_per_class"] = Measure(of_kind[:, 0], counts)
        figures = {"boxes": counts.sum().item(), "classes": len(names), **top_chances(len(names))}
        return Measured(len(pictures), measures, figures)


def _inside(annotation: Annotation, size: tuple[int, int]) -> PixelBox:
    """The part of the picture that a box shows: left, top, right, bottom. Raises `UserError`."""
    left, top, right, bottom = annotation.box
    entry, given = annotation.entry, f"its bbox is {annotation.entry.get('bbox', list)}"
    if left >= right or top >= bottom:
        entry.wrong(f"{given}, a box without area")
    outside = f"{given}, outside of its picture of {size[0]} x {size[1]} pixels"
    if min(left, top) < -ROUNDED or right > size[0] + ROUNDED or bottom > size[1] + ROUNDED:
        entry.wrong(outside)
    box = max(left, 0.0), max(top, 0.0), min(right, float(size[0])), min(bottom, float(size[1]))
    if box[0] >= box[2] or box[1] >= box[3]:
        entry.wrong(outside)
    return box
