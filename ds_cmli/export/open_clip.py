"""Writes a student that began as a model of open_clip as one of open_clip again."""

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ds_cmli.common.errors import UserError
from ds_cmli.common.json_text import JsonObject
from ds_cmli.common.pretrained import loading, reason
from ds_cmli.config.open_clip import CONFIG, LOCAL, RESIZING, loss_of
from ds_cmli.config.schema import Config
from ds_cmli.export.folder import Trained
from ds_cmli.losses.objective import Objective
from ds_cmli.models.open_clip import FILES, of_towers
from ds_cmli.models.open_clip_heads import Attention
from ds_cmli.models.open_clip_towers import OpenClipImage, OpenClipText


def write(folder: Path, trained: Trained) -> list[str]:
    """Write the folder of a model that open_clip loads by `local-dir:`, and check that it does.

    Returns:
        Lines for the user about what was written.

    Raises:
        UserError: open_clip cannot load it.
    """
    import open_clip

    own, config = trained.config.student.source_config, trained.config
    model = of_towers(own)
    content = {"model_cfg": model, "preprocess_cfg": _preprocess(own, config)}
    (folder / CONFIG).write_text(json.dumps(content, indent=2) + "\n")
    tensors = weights(trained.objective, own)
    save_file(tensors, folder / FILES[0], {"format": "pt"})
    if model["text_cfg"].get("hf_tokenizer_name"):
        trained.tokenizer.save_pretrained(folder)
    place = f"{LOCAL}{folder}"
    try:
        with loading(hub=False):
            open_clip.create_model_from_pretrained(place, return_transform=False)
    except Exception as error:
        raise UserError(f"--as open_clip: open_clip cannot load it: {reason(error)}") from None
    lines = ["loads by open_clip.create_model_from_pretrained('local-dir:DIR')"]
    if "multimodal_cfg" in own["model_cfg"]:
        lines.append("a CoCa's decoder of captions is not trained here: its two towers are written")
    return lines


def weights(objective: Objective, own: JsonObject) -> dict[str, Tensor]:
    """The weights of the library's model by its names, with the temperature of its loss.

    Args:
        own: `StudentConfig.source_config`.
    """
    image, text = objective.student.image, objective.student.text
    assert isinstance(image, OpenClipImage) and isinstance(text, OpenClipText)
    out = {f"visual.{name}": value for name, value in _of_tower(image, "proj").items()}
    model = of_towers(own)
    custom = "text." * bool(model.get("custom_text") or "text_config" in own)
    projection = "text_projection"
    linear = bool(model["text_cfg"].get("proj_bias"))
    for name, value in _of_tower(text, projection, linear).items():
        out[f"{custom}{name}"] = value
    loss: Any = dict(objective.losses).get(loss_of(own))
    learned = getattr(loss, "temperature", None)
    starts = {
        "logit_scale": model.get("init_logit_scale", math.log(1 / 0.07)),
        "logit_bias": model.get("init_logit_bias"),
    }
    shape = [1] * bool(model.get("nonscalar_logit_scale"))
    for name, start in starts.items():
        if start is not None:
            out[name] = getattr(learned, name, torch.tensor(float(start))).reshape(shape)
    return {name: value.detach().clone().contiguous() for name, value in out.items()}


def _of_tower(
    tower: OpenClipImage | OpenClipText, projection: str, linear: bool = False
) -> dict[str, Tensor]:
    """The weights of a tower by open_clip's names.

    Args:
        projection: the name of that into the joint space, `class_head` here.
        linear: whether it is a linear layer there, and no parameter [H, E].
    """
    model: nn.Module = tower.model
    joined = tuple(name for name, part in model.named_modules() if isinstance(part, Attention))
    out = {}
    for name, value in model.state_dict().items():
        owner, _, last = name.partition(".in_proj.")
        if owner in joined and last:
            name = f"{owner}.in_proj_{last}"
        out[name] = value
    for name, value in tower.class_head.state_dict().items():
        if linear:
            out[f"{projection}.{name}"] = value
        else:
            out[projection] = value.t()
    return out


def _preprocess(own: JsonObject, config: Config) -> JsonObject:
    modes = {ours: theirs for theirs, ours in RESIZING.items()}
    return {
        "mean": own["mean"],
        "std": own["std"],
        "interpolation": config.data.interpolation,
        "resize_mode": modes[config.data.resize],
    }
