"""`student.source` in the format of open_clip.

A folder or a name of the hub with an `open_clip_config.json`, which open_clip's own prefixes
`local-dir:` and `hf-hub:` may mark, or `open_clip:ARCHITECTURE@WEIGHTS`: a name that the package
has, with a file of weights or the tag of published ones.
"""

import os
from copy import deepcopy
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ds_cmli.common.errors import nearest
from ds_cmli.common.json_text import JsonObject
from ds_cmli.common.pretrained import loading, reason

if TYPE_CHECKING:
    from open_clip import CLIPTextCfg, CLIPVisionCfg

    from ds_cmli.config.sources import Source

CONFIG, WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"
TYPE = "open_clip"  # of a model, as `model_type` in others' config.json
NAMED = "open_clip:"
LOCAL, HUB = "local-dir:", "hf-hub:"  # as in open_clip's own functions
PARTS = {"mean", "std", "model_cfg"}  # of `StudentConfig.source_config`
DEFAULT_TOKENIZER = "open_clip"  # the BPE that comes with the package
# What of a model of open_clip acts in training alone.
OF_TRAINING = ("patch_dropout", "timm_drop", "timm_drop_path")
# "random" is one of the others in open_clip's training, and bicubic else.
INTERPOLATIONS = {"bicubic": "bicubic", "bilinear": "bilinear", "random": "bicubic"}
PADDING = {True: "full", False: "longest"}  # by whether features depend on it
RESIZING = {"shortest": "shortest_pillow", "squash": "squash_pillow"}


@dataclass(frozen=True)
class Named:
    """The parts of `open_clip:ARCHITECTURE@WEIGHTS`."""

    architecture: str
    weights: str  # a file, or the tag of published weights

    @classmethod
    def of(cls, name: str) -> "Named":
        architecture, _, weights = name.removeprefix(NAMED).partition("@")
        return cls(architecture, weights)

    @property
    def file(self) -> Path:
        return Path(self.weights).expanduser()


def is_marked(name: str) -> bool:
    """Whether a name says by its beginning that it is open_clip's."""
    return name.startswith((NAMED, LOCAL, HUB))


def loss_of(own: JsonObject) -> str:
    """The loss whose temperature a model has."""
    return "global" if own["model_cfg"].get("init_logit_bias") is None else "global_sigmoid"


def described(source: "Source") -> JsonObject:
    """What others have in config.json: `model_type`, `model_cfg` and `preprocess_cfg`.

    Raises:
        UserError: there is no such model, or open_clip is not installed.
    """
    if find_spec("open_clip") is None:
        raise source.error(
            "a model of open_clip, which is not installed: pip install 'ds-cmli[open_clip]'"
        )
    if source.name.startswith(NAMED):
        return _of_package(source, Named.of(source.name))
    content = source.json(CONFIG)
    if content is None:
        raise source.error(f"no {CONFIG} there: give the folder of a model of open_clip")
    model, preprocess = content.get("model_cfg"), content.get("preprocess_cfg") or {}
    if not isinstance(model, dict) or not isinstance(preprocess, dict):
        raise source.error(f"its {CONFIG} is damaged: it has no model_cfg")
    return {"model_type": TYPE, "model_cfg": model, "preprocess_cfg": preprocess}


def _of_package(source: "Source", named: Named) -> JsonObject:
    import open_clip

    name = named.architecture
    if name not in open_clip.list_models():
        known = nearest(name, open_clip.list_models())
        raise source.error(f"open_clip has no architecture {name!r}: {known}")
    model = open_clip.get_model_config(name)
    form = f"give {NAMED}{name}@FILE, a file of weights"
    tags = open_clip.list_pretrained_tags_by_model(name)
    if tags:
        form += f", or {NAMED}{name}@TAG, such as {', '.join(tags[:3])}"
    if not named.weights:
        raise source.error(f"it names no weights: {form}")
    preprocess: JsonObject = {}
    if not os.path.isfile(named.file):
        published = open_clip.get_pretrained_cfg(name, named.weights)
        if not published:
            raise source.error(f"{named.weights!r} is no file: {form}")
        if bool(published.get("quick_gelu")) != bool(model.get("quick_gelu")):
            other = name.removesuffix("-quickgelu")
            if published.get("quick_gelu"):
                other = f"{name}-quickgelu"
            raise source.error(
                f"these weights were trained with another activation: give {NAMED}{other}@"
                f"{named.weights}"
            )
        preprocess = published
    return {"model_type": TYPE, "model_cfg": model, "preprocess_cfg": preprocess}


def sections(source: "Source") -> tuple[JsonObject, int, JsonObject]:
    """What a model of open_clip decides.

    Returns:
        `StudentConfig.source_config`, the width of the joint space, and the settings of `data`.

    Raises:
        UserError: it cannot be used, or is of a kind that is not supported.
    """
    import open_clip
    from open_clip.transform import merge_preprocess_dict

    content = source.config
    model = deepcopy(content["model_cfg"])
    try:
        vision = open_clip.CLIPVisionCfg(**model["vision_cfg"])
        text = open_clip.CLIPTextCfg(**model["text_cfg"])
        width = int(model["embed_dim"])
        usual = asdict(open_clip.transform.PreprocessCfg())
        pictures: Any = merge_preprocess_dict(usual, content["preprocess_cfg"])
    except Exception as error:  # a file of others may hold anything
        raise source.error(f"its {CONFIG} cannot be used: {reason(error)}") from None
    mean, std = _of_colours(pictures["mean"]), _of_colours(pictures["std"])
    refusal = _refusal(vision, text, pictures)
    if not refusal and not (_are_numbers(mean) and _are_numbers(std) and all(std)):
        refusal = f"its mean {mean} and std {std} are not three numbers"
    if refusal:
        raise source.error(refusal)
    own = {"model_type": TYPE, "mean": mean, "std": std, "model_cfg": model}
    if text.hf_model_name:
        own["text_config"] = _of_transformers(source, text.hf_model_name)
    # Towers whose features depend on the padding need all of it.
    full = text.no_causal_mask or text.embed_cls or text.pool_type == "last"
    data = {
        "image_size": open_clip.utils.to_2tuple(vision.image_size)[0],
        "resize": RESIZING[pictures["resize_mode"]],
        "interpolation": INTERPOLATIONS[pictures["interpolation"]],
        "tokenizer": _tokenizer(source, text),
        "context_length": text.context_length,
        "padding": PADDING[bool(full)],
    }
    return own, width, data


def _of_transformers(source: "Source", name: str) -> JsonObject:
    """The configuration of a text encoder of transformers, which open_clip names alone."""
    from transformers import AutoConfig

    try:
        with loading(hub=not Path(name).is_dir()):
            return AutoConfig.from_pretrained(name, trust_remote_code=False).to_diff_dict()
    except Exception as error:  # the hub's client and transformers raise their own
        raise source.error(
            f"the sizes of its text encoder {name!r} cannot be read: {reason(error)}"
        ) from None


def _refusal(vision: "CLIPVisionCfg", text: "CLIPTextCfg", pictures: JsonObject) -> str:
    """Why a model is not supported; "" if it is."""
    size, mode = vision.image_size, pictures["resize_mode"]
    if text.tokenizer_mode:
        return f"its tokenizer_mode is {text.tokenizer_mode!r}: give a model without one"
    if isinstance(vision.attentional_pool, str):
        return f"its attentional_pool is {vision.attentional_pool!r}: give a model where it is true"
    if "none" in (vision.pool_type, text.pool_type):
        return "its pool_type is 'none': give a model that pools its features"
    if not isinstance(size, int) and len(set(size)) > 1:
        return f"its pictures are {size[0]} x {size[1]} pixels: give a model of square ones"
    if mode not in RESIZING:
        known = " or ".join(RESIZING)
        return f"its resize_mode is {mode!r}: give a model where it is {known}"
    if pictures["interpolation"] not in INTERPOLATIONS:
        known = ", ".join(INTERPOLATIONS)
        return f"its interpolation is {pictures['interpolation']!r}: give a model with {known}"
    return ""


def _of_colours(value: object) -> list[float]:
    if isinstance(value, list | tuple):
        return list(value)
    return [value] * 3  # type: ignore[list-item] # checked below


def _are_numbers(values: list[float]) -> bool:
    return len(values) == 3 and all(isinstance(value, int | float) for value in values)


def _tokenizer(source: "Source", text: "CLIPTextCfg") -> str:
    """The setting `data.tokenizer`."""
    if not text.hf_tokenizer_name and not text.tokenizer_kwargs:
        return DEFAULT_TOKENIZER
    if is_marked(source.name):
        return source.name.partition("@")[0]
    return f"{(HUB, LOCAL)[source.local]}{source.name}"
