"""`student.source`: what a CLIP or SigLIP model of transformers decides of a student."""

from typing import TYPE_CHECKING, Any

from ds_cmli.common.json_text import JsonObject
from ds_cmli.common.pretrained import loading, reason

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from ds_cmli.config.sources import Source

LOSSES = {
    "clip": "global",
    "siglip": "global_sigmoid",
    "siglip2": "global_sigmoid",
}  # of its training
PROCESSORS = ("preprocessor_config.json", "processor_config.json")  # the newer one holds both
INTERPOLATIONS = {2: "bilinear", 3: "bicubic"}  # by Pillow's numbers
PARTS = {"mean", "std", "vision_config", "text_config"}  # of `StudentConfig.source_config`


def loss_of(own: JsonObject) -> str:
    """The loss whose temperature a model has."""
    return LOSSES[own["model_type"]]


def sections(source: "Source") -> tuple[JsonObject, int, JsonObject]:
    """What a model decides, as `open_clip.sections`."""
    from transformers import CONFIG_MAPPING

    content = source.config
    kind = content["model_type"]
    try:
        with loading(hub=False):
            config = CONFIG_MAPPING[kind].from_dict(content)
    except Exception as error:  # a file of others may hold anything
        raise source.error(f"its config.json cannot be used: {reason(error)}") from None
    vision, text = config.vision_config, config.text_config
    if source.weights is not None:
        raise source.error("a file of weights: of a model of transformers, give its folder")
    data = _of_processor(source, vision)
    own = {"model_type": kind, "mean": data.pop("mean"), "std": data.pop("std")}
    for name in ("vision_config", "text_config"):
        own[name] = _plain(getattr(config, name).to_diff_dict())
    embed_dim = vision.hidden_size
    if kind == "clip":
        embed_dim = own["projection_dim"] = config.projection_dim
    elif text.projection_size != embed_dim:
        raise source.error(
            f"its texts have {text.projection_size} features and its pictures {embed_dim}: no "
            "joint space"
        )
    data |= {
        "tokenizer": source.name,
        "context_length": text.max_position_embeddings,
        "padding": "longest" if kind == "clip" else "full",
    }
    return own, embed_dim, data


def _plain(config: JsonObject) -> JsonObject:
    noise = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures")
    return {name: value for name, value in config.items() if name not in noise}


def _of_processor(source: "Source", vision: "PreTrainedConfig") -> JsonObject:
    """How its processor prepares pictures: the settings of `data`, and mean and deviation.

    `vision`: the configuration of its image tower.
    """
    content: Any = None
    for name in PROCESSORS:
        content = source.json(name) or content
    if content is None:
        raise source.error(f"no {PROCESSORS[0]} there: it says how pictures are prepared")
    content = content.get("image_processor", content)
    interpolation = INTERPOLATIONS.get(content.get("resample", 3))
    if interpolation is None:
        raise source.error(f"its pictures are resampled by Pillow's {content['resample']!r}")
    for name in ("do_resize", "do_rescale", "do_normalize"):
        if content.get(name, True) is not True:
            raise source.error(f"its pictures are prepared with {name} {content[name]!r}")
    return {
        **_square(source, content, vision),
        "interpolation": interpolation,
        "mean": content.get("image_mean"),
        "std": content.get("image_std"),
    }


def _square(source: "Source", content: JsonObject, vision: "PreTrainedConfig") -> JsonObject:
    """Sizes of square pictures."""
    size, crop = _sides(content.get("size")), _sides(content.get("crop_size"))
    image_size, resize = vision.image_size, "squash"
    if content.get("do_center_crop"):
        resize, size = "shortest", crop if size == crop[:1] * len(size) else ()
    if set(size) != {image_size} or (resize == "squash" and len(size) == 1):
        raise source.error(
            f"its pictures are resized to {content.get('size')} and cut to "
            f"{content.get('crop_size')}, and its encoder takes {image_size} pixels square"
        )
    return {"image_size": image_size, "resize": resize}


def _sides(size: object) -> tuple[int, ...]:
    """Height and width of a processor's size, or the shortest side alone."""
    if isinstance(size, int):
        return (size,)
    if isinstance(size, dict) and "shortest_edge" in size:
        return (size["shortest_edge"],)
    if isinstance(size, dict) and {"height", "width"} <= size.keys():
        return size["height"], size["width"]
    return ()
