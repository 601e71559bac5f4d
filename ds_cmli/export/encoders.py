"""Writes the encoders alone for timm and transformers, and checks that they give the same features
there.

Shapes: B images or texts, N patches, M text positions, H width of an encoder, S image side.
"""

import json
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from ds_cmli.common.pretrained import loading, reason
from ds_cmli.export.modeling import CMLIModel

IMAGE, TEXT = "image_encoder_timm", "text_encoder"


@torch.no_grad()
def write_image_encoder(folder: Path, model: CMLIModel, image: Tensor) -> str:
    """Write a folder for `timm.create_model("local-dir:FOLDER", pretrained=True)`.

    Args:
        image: uint8 [B, 3, S, S], the input on which both models are compared.

    Returns:
        A line for the user about what was written, or that timm has no such model.
    """
    settings, side = model.config.settings["student"], model.config.settings["data"]["image_size"]
    backbone = model.student.image
    none = (
        f"no timm checkpoint: {settings['image_model']!r} as it is cut here (its first blocks, no "
        "final norm) is no whole model of timm"
    )
    encoder: Any = getattr(backbone, "model", None)
    if encoder is None:  # a backbone of another library
        return none
    pixels = model.student.pixels(image, torch.float32)
    trained = encoder(pixels)  # [B, prefix + N, H], or a list with a feature map
    wanted = trained[0] if isinstance(trained, list) else trained
    size = {"img_size": side}
    # timm may build the encoder's first blocks as a model with fewer blocks and without the final
    # norm, or as a whole.
    stack = {"depth": len(backbone.blocks), **size}
    for more in ({**stack, "final_norm": False}, stack, size, {}):
        arguments = {**settings["image_overrides"], **more}
        try:
            plain: Any = timm.create_model(settings["image_model"], num_classes=0, **arguments)
            plain.load_state_dict(encoder.state_dict())
            features = plain.eval().forward_features(pixels)
        except Exception:
            continue
        if not torch.equal(features, wanted):
            continue
        folder.mkdir(parents=True, exist_ok=True)
        config = _timm_config(plain, side, arguments)
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        state = {name: value.contiguous() for name, value in plain.state_dict().items()}
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        again: Any = timm.create_model(f"local-dir:{folder}", pretrained=True)
        if torch.equal(again.eval().forward_features(pixels), wanted):
            return (
                f"{folder.name}/: the image encoder before the shared blocks, for timm's local-dir:"
            )
    return none


def _timm_config(model: Any, side: int, arguments: dict[str, object]) -> dict[str, object]:
    given = model.pretrained_cfg
    return {
        "architecture": given["architecture"],
        "num_classes": 0,
        "num_features": model.num_features,
        "pretrained_cfg": {
            "mean": given["mean"],
            "std": given["std"],
            "first_conv": given["first_conv"],
            "input_size": [3, side, side],
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "num_classes": 0,
        },
        "model_args": arguments,
    }


@torch.no_grad()
def write_text_encoder(
    folder: Path, model: CMLIModel, whole: PreTrainedTokenizerFast, ids: Tensor, mask: Tensor
) -> str:
    """Write a folder for a plain transformers model, if it gives the same features there.

    Args:
        whole: the transformers tokenizer.
        ids, mask: int64 and bool [B, M], the input on which both models are compared.

    Returns:
        A line for the user about what was written, or why nothing was.
    """
    encoder: Any = getattr(model.student.text, "model", None)
    kind = type(encoder)
    problem = ""
    if not isinstance(encoder, PreTrainedModel):
        return "no transformers folder of the text encoder: it is of another library"
    try:
        with loading(hub=False):
            encoder.save_pretrained(folder)
            whole.save_pretrained(folder)
            again = kind.from_pretrained(folder, dtype=torch.float32)
        features = again.eval()(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        wanted = encoder(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        if not torch.equal(features, wanted):
            problem = "it gives other features when it is read back"
    except Exception as error:
        problem = reason(error)
    if problem:
        return f"no transformers folder of the text encoder: {problem}"
    name = kind.__name__
    return f"{folder.name}/: the text encoder before the shared blocks, for transformers' {name}"
