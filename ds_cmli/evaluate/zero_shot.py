"""Zero-shot classification: the class whose prompts fit a picture best, by global and CMLI scores.

A class's global embedding is the normalised mean over its prompts (Radford et al., 2021, section
3.1.4). Token embeddings of different prompts have no mean, so the CMLI scores of the prompts, from
the picture's side, are averaged (FILIP, arXiv 2111.07783, section 3.1).

Shapes: B pictures of a batch, C classes, T prompt templates, N patches, H hidden size, D embedding
dimension; K kinds of scores (global, cmli, combined).
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ds_cmli.cmli import cmli_scores
from ds_cmli.common.errors import UserError, blame
from ds_cmli.config.schema import DataConfig
from ds_cmli.data.build import IMAGES
from ds_cmli.data.images import View
from ds_cmli.data.pairs import told
from ds_cmli.distributed import process_group as distributed
from ds_cmli.evaluate.embed import Evaluator, block, share
from ds_cmli.evaluate.metrics import TOP, accuracies_by_class, top_hits
from ds_cmli.evaluate.report import Metrics, prefixed
from ds_cmli.scores import combined

# Seven of OpenAI's eighty prompt templates for ImageNet, which OpenAI found to work about as well
# as all eighty.
TEMPLATES = """itap of a {}.
a bad photo of the {}.
a origami {}.
a photo of the large {}.
a {} in a video game.
art of the {}.
a photo of the small {}."""
CLASSES = 64  # number of classes that are scored at a time


class ClassPictures:
    """The pictures of a folder of class folders, with the classes' names and prompts."""

    def __init__(self, folder: str, names: str | None, templates: str | None, config: DataConfig):
        self.view, root = View.of(config), Path(folder).expanduser()
        places = sorted(place for place in root.glob("*") if place.is_dir())
        self.files = [  # with the numbers of their classes
            (file, number)
            for number, place in enumerate(places)
            for file in sorted(place.rglob("*"))
            if file.suffix.lower() in IMAGES and file.is_file()
        ]
        self.names = [place.name.replace("_", " ") for place in places]
        if names:
            self.names = _lines("--class-names", names)
        self.templates = _lines("--templates", templates) if templates else TEMPLATES.splitlines()
        problem = ""
        if len(places) < 2 or not self.files:
            problem = f"--zero-shot {folder}: give a folder with folders of pictures"
        elif len(self.names) != len(places):
            problem = f"--class-names {names}: {len(self.names)} names for {len(places)} folders"
        elif wrong := [line for line in self.templates if line.count("{}") != 1]:
            problem = f"--templates {templates}: {wrong[0]!r} needs one {{}} for the class's name"
        if problem:
            raise UserError(problem)

    def image(self, number: int) -> Tensor:
        return self.view(self.files[number][0].read_bytes())


def _lines(option: str, file: str) -> list[str]:
    with blame(f"{option} is {file!r}, which cannot be read"):
        lines = Path(file).read_text(encoding="utf-8").splitlines()
    return [line.strip() for line in lines if line.strip()] or [""]


@torch.no_grad()
def classify(model: Evaluator, pictures: ClassPictures) -> Metrics:
    """Measure accuracies over the pictures of all ranks. Collective.

    Returns:
        What `accuracies_by_class` does for each score, `chance/top1`, `chance/top5`, `pictures`,
        `classes`; if pictures could not be read `left_out`, and the names of some.
    """
    classes, templates = len(pictures.names), len(pictures.templates)
    prompts = [t.replace("{}", name) for name in pictures.names for t in pictures.templates]
    texts, bad = model.texts(dict(enumerate(prompts)), len(prompts))
    if bad:
        first = prompts[min(bad)]
        raise UserError(f"the prompt {first!r} has no token: name the class by --class-names")
    embedded, size = [texts[number] for number in range(len(prompts))], CLASSES * templates
    parts = [block(embedded[start : start + size]) for start in range(0, len(prompts), size)]
    blocks = [[x.to(model.device) for x in part] for part in parts]  # once, for all pictures
    means = torch.cat([cls for cls, _, _ in blocks]).unflatten(0, (classes, templates)).mean(1)
    class_cls = F.normalize(means, dim=-1)  # [C, H]

    def scores(cls: Tensor, patches: Tensor) -> Tensor:
        """fp32 [B, H], [B, N, D] -> fp32 [K, B, C]."""
        kinds = {"global": cls @ class_cls.t()}
        if "cmli" in model.kinds:
            of_prompts = [cmli_scores(patches, tokens, mask)[0] for _, tokens, mask in blocks]
            kinds["cmli"] = torch.cat(of_prompts, 1).unflatten(1, (classes, templates)).mean(2)
        if "combined" in model.kinds:
            kinds["combined"] = combined(kinds, model.scales)
        return torch.stack([*kinds.values()])

    hits = torch.zeros(len(TOP), len(model.kinds), classes, dtype=torch.float64)
    counts, lost = torch.zeros(classes, dtype=torch.float64), []
    own = share(len(pictures.files))
    for numbers, cls, patches, broken in model.images(pictures.image, own, pictures.view.size):
        target = torch.tensor([pictures.files[number][1] for number in numbers], dtype=torch.int64)
        hits.index_add_(2, target, top_hits(scores(cls, patches).cpu(), target))  # CPU-GPU sync
        counts += target.bincount(minlength=classes)
        lost += [(pictures.files[number][0].name, why) for number, why in broken.items()]
    distributed.sum_over_ranks(hits)  # collective
    distributed.sum_over_ranks(counts)  # collective
    lost = [bad for of_rank in distributed.gather_objects(lost) for bad in of_rank]  # collective
    if not counts.sum():
        raise UserError(f"--zero-shot: no picture can be read: {', '.join(told(lost))}")
    out: Metrics = {"pictures": int(counts.sum()), "classes": classes}
    if lost:
        out |= {"left_out": len(lost), "left_out_first": told(lost)}
    for k, kind in enumerate(model.kinds):
        out |= prefixed(f"{kind}/", accuracies_by_class(hits[:, k], counts))
    return out | {f"chance/top{k}": min(1.0, k / classes) for k in TOP}
