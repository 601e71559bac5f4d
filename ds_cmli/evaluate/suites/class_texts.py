"""Texts of classes: published prompts and names, and the vectors that patches are compared with.

Shapes: Q names of classes, T prompts of a name, D embedding dimension.
"""

from collections.abc import Sequence
from types import ModuleType
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import AfterValidator
from torch import Tensor

from ds_cmli.cmli.contrastive import upcast
from ds_cmli.common.errors import UserError
from ds_cmli.evaluate.model import EvaluatedModel
from ds_cmli.evaluate.zero_shot import CLASSES, TEMPLATES, Classifier, filled


def _prompts(templates: list[str]) -> list[str]:
    for template in templates or [""]:
        if template.count("{}") != 1:
            raise ValueError(f"write {{}} once in {template!r}, where the class's name goes")
    return templates


# "openai": CLIP's eighty for ImageNet; "seven": those of them that `zero_shot` has; or a list.
Templates = Literal["openai", "seven"] | Annotated[list[str], AfterValidator(_prompts)]


def prompts(templates: Templates) -> list[str]:
    """The T prompts, with {} for the name. Raises `UserError` without open_clip."""
    if isinstance(templates, list):
        return templates
    if templates == "seven":
        return list(TEMPLATES)
    return [prompt("{}") for prompt in _published().OPENAI_IMAGENET_TEMPLATES]


def imagenet_names(folders: Sequence[str]) -> list[str] | None:
    """ImageNet's class names as open_clip publishes them; None: the folders are not ImageNet's.

    Args:
        folders: WordNet's numbers, such as n01440764, of all or some classes; or "0" to "999", as
            ImageNet-V2's.

    Raises:
        UserError: open_clip is not installed.
    """
    from timm.data import ImageNetInfo

    wnids = ImageNetInfo("imagenet-1k").label_names()
    if set(folders) == set(map(str, range(len(wnids)))):
        wnids = list(map(str, range(len(wnids))))
    numbers = dict(zip(wnids, range(len(wnids)), strict=True))
    if not set(folders) <= set(numbers):
        return None
    names = _published().IMAGENET_CLASSNAMES
    return [names[numbers[folder]] for folder in folders]


def _published() -> ModuleType:
    try:
        from open_clip import zero_shot_metadata
    except ImportError:
        raise UserError(
            "the published prompts and names of classes are those of open_clip, which is not "
            'installed: pip install "ds-cmli[open_clip]", or give templates="seven" and the names'
        ) from None
    return zero_shot_metadata


@torch.no_grad()
def class_vectors(
    model: EvaluatedModel, names: Sequence[str], templates: Sequence[str]
) -> dict[str, Tensor]:
    """What patches of unit length are multiplied with, for each kind of scores: fp32 [Q, D]
    on the model's device.

    "global" is the class's text embedding (`zero_shot.Classifier`), projected as patches are and of
    unit length. "cmli", of a model that was trained by it, is the mean over the prompts of the mean
    over their tokens: its product with a patch is their mean cosine.
    """
    student, count = model.objective.student, len(templates)
    weight = next(student.parameters())
    classes, tokens = [], []
    for start in range(0, len(names), CLASSES):
        texts = model.texts(filled(names[start : start + CLASSES], templates))
        cls = Classifier(texts, count, {}).cls.to(weight.device, weight.dtype)
        classes.append(F.normalize(upcast(student.projection(cls)), dim=-1))
        means = torch.segment_reduce(upcast(texts.tokens), "mean", lengths=texts.length)
        tokens.append(means.view(-1, count, means.shape[1]).mean(1).to(weight.device))
    vectors = {"global": torch.cat(classes)}
    if "cmli" in model.scales:
        vectors["cmli"] = torch.cat(tokens)
    return vectors
