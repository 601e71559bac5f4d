"""What a start leaves out of pretrained models or begins with at random, in one line each."""

import math
import re
from collections.abc import Iterator
from itertools import permutations
from pathlib import Path
from typing import Any

import timm
from torch import nn

from ds_cmli.cmli.loss import MAX_SCALE
from ds_cmli.config import open_clip
from ds_cmli.config.registry import LOSSES
from ds_cmli.config.schema import Config, StudentConfig
from ds_cmli.engine.parameter_groups import ENCODERS
from ds_cmli.losses.objective import Objective
from ds_cmli.models.backbone import ImageBackbone, TextBackbone
from ds_cmli.models.teacher import Teacher

CONTRASTIVE = re.compile("clip|siglip")  # in the names of models trained on pictures with captions
# In timm's names of models that differ in their activation alone.
ACTIVATIONS = {"GELU": "_clip_", "QuickGELU": "_clip_quickgelu_"}
OWN_PLACE = {
    "siglip_text_model": "the last position of a filled text",
    "siglip2_text_model": "the last position of a filled text",
    "chinese_clip_text_model": "the first token",
}


def start_lines(config: Config, objective: Objective, teacher: Teacher | None) -> Iterator[str]:
    """Lines about what training begins with, for models as `build_models` has made them."""
    student, built = config.student, objective.student
    for part in ENCODERS:
        name, encoder = getattr(student, f"{part}_model"), getattr(built, part)
        blocks = len(encoder.blocks)
        if encoder.depth is not None and blocks < encoder.depth:
            yield (
                f"student.{part}_model {name!r}: the first {blocks} of its {encoder.depth} blocks "
                "are used, without what follows them"
            )
    if student.source:
        yield from _of_source(student.source, objective)
        yield from open_clip.training_lines(student.source_config)
    else:
        if student.image_weights != "random":
            yield from _of_image_weights(student, built.image)
        if student.text_weights != "random":
            yield from _of_text_weights(student, built.text)
    if not isinstance(built.text_head, nn.Identity):
        yield _between("student.text_model", built.text.width, built.width)
    if teacher is not None and objective.width_head is not None:
        yield _between("teacher.model", teacher.width, built.width)
    yield from _frozen_at_random(student, objective)
    if teacher is not None and config.teacher.weights == "random":
        yield "teacher.weights is 'random': the student learns features of no meaning"


def _of_source(source: str, objective: Objective) -> Iterator[str]:
    """What of a dual encoder the losses do not begin with, if its space is kept."""
    start = objective.student.start
    if start is None:
        return
    of_classes = [name for name in objective.losses if LOSSES[name].scores == "global"]
    place, scale = f"student.source {source!r}", math.exp(start.log_scale)
    if not of_classes:
        yield f"{place}: no loss compares class tokens: its temperature is not used"
    if "global" in of_classes and scale > MAX_SCALE:
        yield f"{place}: 1/temperature is {scale:.1f}, and the loss global has at most {MAX_SCALE}"
    if start.bias is not None and "global_sigmoid" not in of_classes:
        yield f"{place}: it was trained with a sigmoid loss: global_sigmoid starts with its bias"


def _between(setting: str, width: int, students: int) -> str:
    return (
        f"{setting} is {width} wide and the student {students}: the linear layer between them "
        "starts at random"
    )


def _of_image_weights(student: StudentConfig, encoder: ImageBackbone) -> Iterator[str]:
    name, weights, model = student.image_model, student.image_weights, getattr(encoder, "model", 0)
    if CONTRASTIVE.search(name.lower()):
        yield _unaligned("student.image_weights", weights)
    pooling = getattr(encoder, "own_pooling", "token")
    if getattr(encoder, "has_class_token", False) and pooling != "token":
        yield f"student.image_model {name!r}: the class token replaces its own pooling {pooling!r}"
    # timm's notes say it of the hub's weights.
    quick = "QuickGELU" in str(getattr(model, "pretrained_cfg", {}).get("notes"))
    for mine, theirs in permutations(ACTIVATIONS):
        plain = name.partition(".")[0]
        other = plain.replace(ACTIVATIONS[mine], ACTIVATIONS[theirs])
        known = weights == "hub" and quick == (mine == "QuickGELU")
        if other != plain and timm.is_model(other) and not known:
            yield (
                f"student.image_model {name!r} computes {mine}: weights that were trained with "
                f"{theirs} need {other!r}"
            )


def _of_text_weights(student: StudentConfig, encoder: TextBackbone) -> Iterator[str]:
    model: Any = getattr(encoder, "model", None)
    kind = getattr(getattr(model, "config", None), "model_type", "")
    weights = student.text_weights
    if CONTRASTIVE.search(kind):
        yield _unaligned("student.text_weights", weights)
    if kind in OWN_PLACE:
        yield (
            f"student.text_model {student.text_model!r}: a text is pooled at its last token, where "
            f"the model's own place is {OWN_PLACE[kind]}"
        )
    if Path(weights).is_file():
        yield (
            f"student.text_weights {weights}: a file without config.json: heads, activation and "
            f"the like are those of {student.text_model!r} with student.text_overrides"
        )


def _unaligned(setting: str, weights: str) -> str:
    return (
        f"{setting} {weights}: the projection and logit scale of its contrastive training are not "
        "used: images and texts start unaligned"
    )


def _frozen_at_random(student: StudentConfig, objective: Objective) -> Iterator[str]:
    """A warning for each encoder with frozen matrices that are random."""
    for part in ENCODERS:
        every = getattr(student, f"{part}_weights") == "random"
        count = 0
        for parameter in getattr(objective.student, part).parameters():
            random = every or getattr(parameter, "starts_random", False)
            count += random and parameter.dim() > 1 and not parameter.requires_grad
        if count:
            yield (
                f"warning: {count} random matrices of the {part} encoder are frozen, by "
                f"student.freeze_{part} or student.lora, and never learn: give "
                f"student.{part}_weights that have them"
            )
