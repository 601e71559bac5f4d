"""Writes a student that began as a model of another library as one of that library again.

The tokens' maps into the joint space, which the library's model has no place for, are a file of
their own.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModel, CLIPImageProcessor, PreTrainedModel, SiglipImageProcessor

from ds_cmli.common.errors import UserError
from ds_cmli.common.pretrained import loading
from ds_cmli.config.schema import Config
from ds_cmli.config.sources import INTERPOLATIONS, LIBRARY, loss_of
from ds_cmli.export.folder import Trained
from ds_cmli.losses.objective import Objective
from ds_cmli.models import dual

TOKENS = "token_maps.safetensors"


# What is written: two classes of transformers, or a library's own.
CLASSES = {"clip": "CLIPModel", "siglip": "SiglipModel", "open_clip": "open_clip"}


def check(config: Config, kind: str) -> None:
    """Raise `UserError` unless the student of a run is a model of that kind."""
    own = config.student.source_config.get("model_type", "two encoders")
    if own != kind:
        raise UserError(f"--as is {kind!r}, and the run's student began as {own}")
    if config.student.shared_blocks:
        raise UserError(
            f"--as is {kind!r}: {CLASSES[kind]} has no shared blocks, and the student has "
            f"{config.student.shared_blocks}"
        )


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
    loss: Any = dict(objective.losses).get(LIBRARY[library.model_type])
    with torch.no_grad():
        if loss is not None:
            model.logit_scale.copy_(loss.logit_scale.reshape(model.logit_scale.shape))
            if hasattr(loss, "logit_bias"):
                model.logit_bias.copy_(loss.logit_bias)
        elif library.model_type == "siglip":  # as its own training starts
            model.logit_scale.fill_(2.303)
            model.logit_bias.fill_(-10.0)
    return model.eval()


def write(folder: Path, trained: Trained, kind: str) -> list[str]:
    """Write the folder of a model that its library loads as any other.

    Returns:
        Lines for the user about what was written.

    Raises:
        UserError: as `check`.
    """
    check(trained.config, kind)
    if kind == "open_clip":
        from ds_cmli.export import open_clip

        lines = open_clip.write(folder, trained)
    else:
        model = assembled(trained.objective, trained.config)
        with loading(hub=False):
            model.save_pretrained(folder)
            trained.tokenizer.save_pretrained(folder)
            _processor(trained.config).save_pretrained(folder)
        lines = [f"loads by {CLASSES[kind]}.from_pretrained"]
    maps: dict[str, torch.Tensor] = {}
    for side in ("image", "text"):
        tower: nn.Module = getattr(trained.objective.student, side)
        for name, value in tower.token_head.state_dict().items():  # type: ignore[union-attr]
            maps[f"{side}.{name}"] = value.contiguous()
    save_file(maps, folder / TOKENS)
    loss = loss_of(trained.config.student.source_config)
    lines.append(
        f"{TOKENS}: the maps of patches and tokens into the joint space, of which "
        f"{CLASSES[kind]} reads nothing"
    )
    if loss not in trained.objective.losses:
        lines.append(f"no loss {loss} was trained: temperature and bias are those of a new model")
    return lines


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
