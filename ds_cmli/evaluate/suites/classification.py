"""Zero-shot classification of a folder of class folders, such as ImageNet's validation pictures.

Shapes: n pictures, C classes.
"""

from functools import cached_property
from pathlib import Path

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor

from ds_cmli.common.errors import UserError
from ds_cmli.config.schema import STRICT, DataConfig
from ds_cmli.data.loaders import batches
from ds_cmli.evaluate import zero_shot
from ds_cmli.evaluate.held_out import collate_pictures
from ds_cmli.evaluate.metrics import TOP, top_chances
from ds_cmli.evaluate.model import EvaluatedModel
from ds_cmli.evaluate.retrieval import kinds
from ds_cmli.evaluate.suites.class_texts import Templates, imagenet_names, prompts
from ds_cmli.evaluate.suites.task import Measure, Measured


@dataclass(config=STRICT, frozen=True)
class Classification:
    data: Path  # a folder of class folders, or a .tar of such
    # A name on each line in the order of the folders, or JSON {folder: name}. Without it, for
    # folders of WordNet's numbers ImageNet's published names, or else the folders' own.
    classes: Path | None = None
    templates: Templates = "openai"

    def read(self) -> None:
        _ = self.names, prompts(self.templates)

    @cached_property
    def names(self) -> list[str]:
        folders = self.pictures(DataConfig()).folders
        if self.classes is None:
            return imagenet_names(folders) or zero_shot.class_names(folders, None)
        return zero_shot.class_names(folders, str(self.classes), "classes")

    def pictures(self, config: DataConfig) -> zero_shot.ClassPictures:
        return zero_shot.ClassPictures(str(self.data), config, "data")

    def run(self, model: EvaluatedModel) -> Measured:
        """Classify all pictures: `<score>/top1`, `<score>/top5`, and `<score>/mean_per_class`.

        The last is top 1 averaged over the classes that have pictures.
        """
        templates, classes = prompts(self.templates), len(self.names)
        texts = model.texts(zero_shot.filled(self.names, templates))
        classifier = zero_shot.Classifier(texts, len(templates), model.scales)
        pictures = self.pictures(model.config.data)
        shown = pictures.pictures(range(len(pictures)))
        loader = batches(shown, model.how.batch_size, model.how.workers, collate_pictures)
        hits = zero_shot.picture_hits(model.objective.student, loader, classifier, model.how)
        for name, reason in hits.broken.values():
            raise UserError(f"the picture {name} cannot be read ({reason}): fetch it again")
        measures = {}
        place = torch.stack([torch.arange(len(pictures)), hits.target])

        def of_class(values: Tensor) -> Tensor:
            """[n] -> [n, C], sparse: of ImageNet a dense one takes 400 MB."""
            size = len(pictures), classes
            return torch.sparse_coo_tensor(place, values, size, check_invariants=True)

        counts = of_class(torch.ones(len(pictures), dtype=torch.float64))
        for kind, of_kind in zip(kinds(model.scales), hits.top.unbind(1), strict=True):
            for top, right in zip(TOP, of_kind, strict=True):
                measures[f"{kind}/top{top}"] = Measure.accuracy(right)
            measures[f"{kind}/mean_per_class"] = Measure(of_class(of_kind[0]), counts)
        return Measured(len(pictures), measures, top_chances(classes) | {"classes": classes})
