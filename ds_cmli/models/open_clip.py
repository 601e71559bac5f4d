"""Builds the two towers of an open_clip model, and loads its weights; mistakes are `UserError`.

It is always built as open_clip's `CustomTextCLIP`: of a CoCa without its decoder of captions.
"""

import os
import tempfile
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from transformers import CONFIG_MAPPING, PreTrainedConfig

from ds_cmli.common.json_text import JsonObject
from ds_cmli.common.pretrained import loading, reason
from ds_cmli.config.open_clip import HUB, NAMED, OF_TRAINING, Named
from ds_cmli.config.schema import StudentConfig
from ds_cmli.config.sources import Source
from ds_cmli.models.dual import Start
from ds_cmli.models.transformers_model import ATTENTION_DROPOUT, DROPOUT
from ds_cmli.models.weights import WeightsSource, check_finite, check_room, count

if TYPE_CHECKING:
    from ds_cmli.models.open_clip_towers import OpenClipImage, OpenClipText

# The names that open_clip prefers in a folder, the first one there first.
FILES = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
    "open_clip_pytorch_model.pth",
    "model.safetensors",
    "pytorch_model.bin",
    "pytorch_model.pth",
    "model.pth",
)
# The weights of a CoCa that are of no tower.
DECODER = "text_decoder."


def of_towers(own: JsonObject) -> JsonObject:
    """The part of `model_cfg` of `StudentConfig.source_config` that two towers have."""
    model = deepcopy(own["model_cfg"])
    if model.pop("multimodal_cfg", None) is not None:
        for side in ("vision_cfg", "text_cfg"):
            model[side].pop("output_tokens", None)
        model["custom_text"] = True
    return model


def whole(own: JsonObject) -> nn.Module:
    """The `CustomTextCLIP` with random weights, without what acts in training alone."""
    from open_clip import CustomTextCLIP

    model = of_towers(own)
    model.pop("custom_text", None)
    for name in OF_TRAINING:
        if model["vision_cfg"].get(name):
            model["vision_cfg"][name] = 0.0
    model["vision_cfg"]["timm_model_pretrained"] = False
    with loading(hub=False), tempfile.TemporaryDirectory() as folder:
        if "text_config" in own:  # open_clip reads it by a name
            transformers_config(own).save_pretrained(folder)
            model["text_cfg"] |= {"hf_model_name": folder, "hf_model_pretrained": False}
        return CustomTextCLIP(**model)


def transformers_config(own: JsonObject) -> PreTrainedConfig:
    """The configuration of a text encoder of transformers, without dropout."""
    fields = deepcopy(own["text_config"])
    config = CONFIG_MAPPING[fields["model_type"]].from_dict(fields)
    for name in (*DROPOUT, *ATTENTION_DROPOUT):
        if hasattr(config, name):
            setattr(config, name, 0.0)
    config.use_cache = False
    return config


def build(
    config: StudentConfig, image_size: int, pretrained: bool
) -> "tuple[OpenClipImage, OpenClipText, Start | None]":
    """Both towers of the source, on the CPU in fp32.

    Args:
        image_size: S, which is the source's.
        pretrained: whether to load the source's weights; if not, they are random.

    Returns:
        The towers, and what the losses start with; None for random weights.

    Raises:
        UserError: open_clip cannot build the model, or its weights do not fit.
    """
    from ds_cmli.models.open_clip_heads import NoHead
    from ds_cmli.models.open_clip_towers import OpenClipImage, OpenClipText

    own, source = config.source_config, WeightsSource("student.source", config.source, False)
    try:
        if not isinstance(torch.empty(0), FakeTensor):
            with torch.device("meta"):
                parameters = count(whole(own))
            check_room("student.source", config.source, parameters)
        model: Any = whole(own)
    except (AssertionError, LookupError, RuntimeError, TypeError, ValueError) as error:
        why = reason(error).rstrip(": ")
        raise source.error(f"open_clip cannot build it: {why}") from None
    start = None
    if pretrained and config.source:
        _load(source, model)
        bias = model.logit_bias
        start = Start(model.logit_scale.item(), None if bias is None else bias.item())
    try:
        image = OpenClipImage(model.visual, config.embed_dim, own["mean"], own["std"])
    except NoHead as error:
        raise source.error(f"{error}, which is not supported: give another model") from None
    return image, OpenClipText(model.text, config.embed_dim), start


def vocab_size(config: StudentConfig) -> int:
    """The number of rows of the source's table of tokens."""
    own = config.source_config
    if "text_config" in own:
        return transformers_config(own).vocab_size
    return own["model_cfg"]["text_cfg"].get("vocab_size", 49408)


def width(config: StudentConfig) -> int:
    """The width of the joint space."""
    return config.embed_dim


def _load(source: WeightsSource, model: nn.Module) -> None:
    import open_clip

    path = _file(source)
    try:
        with loading(hub=False):
            keys = open_clip.load_checkpoint(model, str(path), strict=False)
    except Exception as error:
        raise source.error(f"its weights cannot be loaded: {reason(error)}") from None
    missing, unexpected = keys or ([], [])  # a file of numpy's is checked when it is read
    unexpected = [key for key in unexpected if not key.startswith(DECODER)]
    for kind, names in (("missing", missing), ("not of the model", unexpected)):
        if names:
            raise source.error(f"{len(names)} weights are {kind}, such as {min(names)}")
    check_finite(source, model)


def _file(source: WeightsSource) -> Path:
    """The file of weights, fetched if it is on the hub. Raises `UserError`."""
    from open_clip import pretrained

    name = source.weights
    try:
        if name.startswith(NAMED):
            named = Named.of(name)
            if os.path.isfile(named.file):
                return named.file
            published = pretrained.get_pretrained_cfg(named.architecture, named.weights)
            with loading(hub=True):
                return Path(pretrained.download_pretrained(published))
        place = Source(name)
        if not place.local:
            with loading(hub=True):
                return Path(pretrained.download_pretrained_from_hf(name.removeprefix(HUB)))
    except Exception as error:  # the hub's client raises its own
        why = error.__cause__ if isinstance(error.__cause__, Exception) else error
        raise source.error(f"its weights cannot be fetched: {reason(why)}") from None
    if place.weights is not None:
        return place.path / place.weights
    files = [place.path / file for file in FILES if (place.path / file).is_file()]
    if not files:
        kinds = ("*.safetensors", "*.bin", "*.pth", "*.pt")
        files = sorted(file for kind in kinds for file in place.path.glob(kind))
    if not files:
        raise source.error(f"no weights there: give a folder with {FILES[0]}")
    return files[0]
