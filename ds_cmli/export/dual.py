"""Writes a student that began as a CLIP or SigLIP model of transformers as one of it again."""

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModel,
    CLIPImageProcessor,
    PreTrainedModel,
    SiglipImageProcessor,
)

from ds_cmli.common.pretrained import loading
from ds_cmli.config.dual import INTERPOLATIONS, loss_of
from ds_cmli.config.schema import Config
from ds_cmli.export.folder import Trained
from ds_cmli.losses.objective import Objective
from ds_cmli.models import dual


def write(folder: Path, trained: Trained) -> list[str]:
    """Write the folder of a model that transformers loads as any other.

    Returns:
        Lines for the user about what was written.
    """
    model = assembled(trained.objective, trained.config)
    with loading(hub=False):
        model.save_pretrained(folder)
        trained.tokenizer.save_pretrained(folder)
        _processor(trained.config).save_pretrained(folder)
    return [f"loads by {type(model).__name__}.from_pretrained"]


def assembled(objective: Objective, config: Config) -> PreTrainedModel:
    """The library's model of the student's own parts, with the temperature of its loss."""
    library = dual.library(config.student)
    model: Any = AutoModel.from_config(library, dtype=torch.float32)
    image, text = objective.student.image, objective.student.text
    assert isinstance(image, dual.DualImage) and isinstance(text, dual.DualText)
    model.vision_model, model.text_model = image.model, text.model
    if library.model_type == "clip":
        model.visual_projection, model.text_projection = image.class_head, text.class_head
    else:
        model.text_model.head = text.class_head
    loss: Any = dict(objective.losses).get(loss_of(config.student.source_config))
    with torch.no_grad():
        if loss is not None:
            learned = loss.temperature
            model.logit_scale.copy_(learned.logit_scale.reshape(model.logit_scale.shape))
            if learned.logit_bias is not None:
                model.logit_bias.copy_(learned.logit_bias)
        elif library.model_type != "clip":  # as its own training starts
            model.logit_scale.fill_(2.303)
            model.logit_bias.fill_(-10.0)
    return model.eval()


def _processor(config: Config) -> CLIPImageProcessor | SiglipImageProcessor:
    own, side = config.student.source_config, config.data.image_size
    resample = {name: number for number, name in INTERPOLATIONS.items()}[config.data.interpolation]
    how: dict[str, Any] = {
        "image_mean": own["mean"],
        "image_std": own["std"],
        "resample": resample,
    }
    square = {"height": side, "width": side}
    if config.data.resize == "shortest":
        return CLIPImageProcessor(size={"shortest_edge": side}, crop_size=square, **how)
    if own["model_type"] == "clip":
        return CLIPImageProcessor(size=square, do_center_crop=False, **how)
    return SiglipImageProcessor(size=square, **how)
