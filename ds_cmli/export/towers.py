"""Exports the encoders, without the shared blocks above them, in the formats of timm and
transformers.

Shapes: B images or texts, N patches, M text positions, H width of the encoder.
"""

import json
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file
from torch import Tensor

from ds_cmli.common.pretrained import loading, reason
from ds_cmli.export.modeling import CMLIModel

IMAGE, TEXT = "image_encoder_timm", "text_encoder"


@torch.no_grad()
def write_image_encoder(folder: Path, model: CMLIModel, image: Tensor) -> str:
    """Write a folder for `timm.create_model("local-dir:FOLDER", pretrained=True)`, if such a model
    exists in timm.

    Args:
        image: uint8 [B, 3, S, S], the input on which both models are compared.

    Returns:
        A line for the user about what was written, or why nothing was.
    """
    settings, data, backbone = (
        model.config.settings["student"],
        model.config.settings["data"],
        model.student.image,
    )
    encoder: Any = backbone.model
    pixels = model.student.pixels(image, torch.float32)
    trained = encoder(pixels)  # [B, prefix + N, H], or a list with a feature map
    wanted = trained[0] if isinstance(trained, list) else trained
    size = {"img_size": data["image_size"]}
    # timm may build the encoder's first blocks as a model with fewer blocks and without the final
    # norm, or as a whole.
    stack = {"depth": len(backbone.blocks)}
    for more in ({**stack, **size, "final_norm": False}, {**stack, **size}, size, {}):
        arguments = {"num_classes": 0, **settings["image_overrides"], **more}
        try:
            plain: Any = timm.create_model(settings["image_model"], **arguments)
            plain.load_state_dict(encoder.state_dict())
            found = plain.eval().forward_features(pixels)
        except Exception:
            continue
        if not torch.equal(found, wanted):
            continue
        folder.mkdir(parents=True, exist_ok=True)
        config = {
            "architecture": plain.pretrained_cfg["architecture"],
            "num_classes": 0,
            "num_features": plain.num_features,
            "pretrained_cfg": {
                **{name: plain.pretrained_cfg[name] for name in ("mean", "std", "first_conv")},
                "input_size": [3, data["image_size"], data["image_size"]],
                "interpolation": "bicubic",
                "crop_pct": 1.0,
                "num_classes": 0,
            },
            "model_args": {
                name: value for name, value in arguments.items() if name != "num_classes"
            },
        }
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        state = {name: value.contiguous() for name, value in plain.state_dict().items()}
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        again: Any = timm.create_model(f"local-dir:{folder}", pretrained=True)
        if torch.equal(again.eval().forward_features(pixels), wanted):
            return (
                f"{folder.name}/: the image encoder before the shared blocks, for timm's local-dir:"
            )
    return (
        f"no timm checkpoint: {settings['image_model']!r} as it is cut here (its first blocks, no final norm) is no "
        "whole model of timm"
    )


@torch.no_grad()
def write_text_encoder(
    folder: Path, model: CMLIModel, whole: Any, ids: Tensor, mask: Tensor
) -> str:
    """Write a folder for a plain transformers model, if the text encoder gives the same features
    when loaded from it.

    Args:
        whole: the transformers tokenizer.
        ids, mask: int64 and bool [B, M], the input on which both models are compared.

    Returns:
        A line for the user about what was written, or why nothing was.
    """
    encoder: Any = model.student.text.model
    kind = type(encoder)
    try:
        with loading(hub=False):
            encoder.save_pretrained(folder)
            whole.save_pretrained(folder)
            again = kind.from_pretrained(folder, dtype=torch.float32)
        found = again.eval()(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        wanted = encoder(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        problem = (
            "" if torch.equal(found, wanted) else "it gives other features when it is read back"
        )
    except Exception as error:
        problem = reason(error)
    if problem:
        return f"no transformers folder of the text encoder: {problem}"
    return f"{folder.name}/: the text encoder before the shared blocks, for transformers' {kind.__name__}"
