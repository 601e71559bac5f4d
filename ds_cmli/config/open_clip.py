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

from ds_cmli.common.errors import blame, nearest
from ds_cmli.common.json_text import JsonObject
from ds_cmli.common.pretrained import loading

if TYPE_CHECKING:
    from open_clip import CLIPTextCfg

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
    """
    import open_clip
    from open_clip.transform import merge_preprocess_dict

    what, content = f"student.source is {source.name!r}", source.config
    model = deepcopy(content["model_cfg"])
    with blame(f"{what}: its {CONFIG} cannot be used"):  # a file of others may hold anything
        vision = open_clip.CLIPVisionCfg(**model["vision_cfg"])
        text = open_clip.CLIPTextCfg(**model["text_cfg"])
        width, size = int(model["embed_dim"]), vision.image_size
        usual = asdict(open_clip.transform.PreprocessCfg())
        pictures: Any = merge_preprocess_dict(usual, content["preprocess_cfg"])
    pool, mode = vision.attentional_pool, pictures["resize_mode"]
    interpolation = pictures["interpolation"]
    for name, value, fits in (
        ("tokenizer_mode", text.tokenizer_mode, not text.tokenizer_mode),
        ("attentional_pool", pool, not isinstance(pool, str)),
        ("pool_type", "none", "none" not in (vision.pool_type, text.pool_type)),
        ("image_size", size, isinstance(size, int) or len(set(size)) == 1),
        ("resize_mode", mode, mode in RESIZING),
        ("interpolation", interpolation, interpolation in INTERPOLATIONS),
    ):
        if not fits:
            raise source.error(f"its {name} is {value!r}, which is not supported")
    own: JsonObject = {"model_type": TYPE, "model_cfg": model}
    for name in ("mean", "std"):
        value = pictures[name]
        own[name] = list(value) if isinstance(value, list | tuple) else [value] * 3
    if name := text.hf_model_name:  # open_clip names it alone
        from transformers import AutoConfig

        hub = not Path(name).is_dir()
        with blame(f"{what}: the sizes of its text encoder cannot be read"), loading(hub=hub):
            config = AutoConfig.from_pretrained(name, trust_remote_code=False)
        own["text_config"] = config.to_diff_dict()
    # Towers whose features depend on the padding need all of it.
    full = text.no_causal_mask or text.embed_cls or text.pool_type == "last"
    data = {
        "image_size": size if isinstance(size, int) else size[0],
        "resize": RESIZING[mode],
        "interpolation": INTERPOLATIONS[interpolation],
        "tokenizer": _tokenizer(source, text),
        "context_length": text.context_length,
        "padding": "full" if full else "longest",
    }
    return own, width, data


def _tokenizer(source: "Source", text: "CLIPTextCfg") -> str:
    """The setting `data.tokenizer`."""
    if not text.hf_tokenizer_name and not text.tokenizer_kwargs:
        return DEFAULT_TOKENIZER
    if is_marked(source.name):
        return source.name.partition("@")[0]
    return f"{(HUB, LOCAL)[source.local]}{source.name}"
