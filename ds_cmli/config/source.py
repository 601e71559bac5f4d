"""`student.source`: a model of two encoders, whose files decide the settings of a student.

It is a CLIP or SigLIP model of transformers or a model of open_clip, each as a folder or by its
name on the hub, where open_clip's own prefixes `local-dir:` and `hf-hub:` may mark its format;
`open_clip:ARCHITECTURE@WEIGHTS`, with a file of weights or the tag of published ones; or the folder
of a run or of an export of this package.
"""

import json
import os
from collections.abc import Mapping
from contextlib import AbstractContextManager
from copy import deepcopy
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any

from ds_cmli.config.messages import check, choice
from ds_cmli.config.schema import Config, Sections, StudentConfig
from ds_cmli.errors import UserError, blame
from ds_cmli.files import JsonObject, Section, read_json
from ds_cmli.pretrained import loading

RUN = "run.json"  # the settings of a run
MODEL_CONFIG = "config.json"  # of transformers, and of this package
OPEN_CLIP_CONFIG = "open_clip_config.json"
ARCHITECTURE_PREFIX = "open_clip:"
LOCAL_PREFIX = "local-dir:"  # this one and the next as in open_clip
HUB_PREFIX = "hf-hub:"
DEFAULT_TOKENIZER = "open_clip"  # the BPE that comes with open_clip
# Settings of a student that belong to one training, and not to its architecture.
TRAINING_SETTINGS = ("freeze_image", "freeze_text", "lora", "lora_rank", "lora_alpha")
NO_TRAINING = {name: getattr(StudentConfig(), name) for name in TRAINING_SETTINGS}
NO_TRAINING |= {"dropout": 0.0}
# The types of other libraries' dual encoders, and the module in `models` that builds them.
DUAL = {"clip": "dual", "siglip": "dual", "open_clip": "open_clip"}
# Fields of transformers' configurations that change no tensor.
IRRELEVANT_FIELDS = ("_name_or_path", "transformers_version", "dtype", "architectures")
PILLOW = {2: "bilinear", 3: "bicubic"}  # interpolations of transformers


def is_marked(name: str) -> bool:
    """Return True if a name begins with a prefix that says that it is open_clip's."""
    return name.startswith((ARCHITECTURE_PREFIX, LOCAL_PREFIX, HUB_PREFIX))


def temperature_loss(source_config: JsonObject) -> str:
    """Return the name of the loss whose temperature a model of `source_config` has."""
    has_bias = source_config.get("model_cfg", {}).get("init_logit_bias") is not None  # open_clip
    return "global_sigmoid" if has_bias or source_config["model_type"] == "siglip" else "global"


def export_library(config: Config) -> str | None:
    """Return the `--as` with which a run can be exported without its source, or None."""
    source_config = config.student.source_config
    loss = temperature_loss(source_config) if source_config else None
    if loss not in config.loss.weights or config.student.shared_blocks:
        return None
    return source_config["model_type"]


class ModelSource:
    """The files of a source, in a folder or on the hub; `name`: the value of `student.source`."""

    def __init__(self, name: str):
        self.name = name
        self.weights: str | None = None  # the name of a file, if `name` ends in one
        self.bare_name = name.removeprefix(LOCAL_PREFIX).removeprefix(HUB_PREFIX)
        self.local_folder = Path(os.path.expanduser(self.bare_name))  # the folder of the model
        # `os.path` returns False for a name that is too long for a path, where pathlib may raise.
        if self.local_folder.suffix == ".safetensors" and os.path.isfile(self.local_folder):
            self.weights = self.local_folder.name
            self.local_folder = self.local_folder.parent
        self.is_local = not name.startswith(HUB_PREFIX) and os.path.exists(self.local_folder)

    @property
    def is_run(self) -> bool:
        """True for a run, whose settings say what it was trained on."""
        return self.is_local and (self.local_folder / RUN).is_file()

    @property
    def is_ds_cmli(self) -> bool:
        """True for a run or an export of this package."""
        return self.config.get("model_type") == "ds_cmli"

    def error(self, problem: str) -> UserError:
        return UserError(f"student.source is {self.name!r}: {problem}")

    def blame(self, problem: str) -> AbstractContextManager[None]:
        return blame(str(self.error(problem)))

    @cached_property
    def json_folder(self) -> Path:
        """The folder of its JSON files; those of the hub are fetched into its cache."""
        if self.is_local or self.name.startswith(LOCAL_PREFIX):
            return self.local_folder
        from huggingface_hub import snapshot_download

        names = [
            MODEL_CONFIG,
            OPEN_CLIP_CONFIG,
            "preprocessor_config.json",
            "processor_config.json",
        ]
        fetched = f"the JSON of {self.bare_name}"  # weights are fetched later, by their own name
        with self.blame("no such file or folder, nor on the hub"), loading(True, fetched):
            return Path(snapshot_download(self.bare_name, allow_patterns=names))

    def read_json_file(self, name: str) -> JsonObject:
        """Return the content of a JSON file; empty if the source has no file of that name."""
        if not (self.json_folder / name).is_file():
            return {}
        with self.blame(f"its {name} cannot be read"):
            return read_json(self.json_folder / name)

    @cached_property
    def config(self) -> JsonObject:
        """Its `config.json`; of open_clip `model_cfg` and `preprocess_cfg`. Raises `UserError`."""
        content = {} if is_marked(self.name) else self.read_json_file(MODEL_CONFIG)
        if "model_type" in content:  # models that both libraries load have both files
            return content
        is_architecture = self.name.startswith(ARCHITECTURE_PREFIX)
        content = {} if is_architecture else self.read_json_file(OPEN_CLIP_CONFIG)
        if not is_architecture and "model_cfg" not in content:
            files = f"{MODEL_CONFIG} or {OPEN_CLIP_CONFIG}"
            raise self.error(f"no {files} there: give the folder of a model or run")
        with self.blame("a model of open_clip: pip install 'ds-cmli[open_clip]'"):
            import_module("open_clip")
        if is_architecture:
            content = self._architecture()
        return {"preprocess_cfg": {}, **content, "model_type": "open_clip"}

    @property
    def in_open_clip(self) -> tuple[str, str | None]:
        """The name by which `open_clip.create_model` knows the model, and a file or tag of weights.

        The second is None if the name includes the weights.
        """
        if self.name.startswith(ARCHITECTURE_PREFIX):
            architecture, _, weights = self.name.removeprefix(ARCHITECTURE_PREFIX).partition("@")
            file = os.path.expanduser(weights)
            return architecture, file if os.path.isfile(file) else weights
        prefix = LOCAL_PREFIX if self.is_local else HUB_PREFIX
        return f"{prefix}{self.bare_name}", None

    def _architecture(self) -> JsonObject:
        """Return `model_cfg` and `preprocess_cfg` of an architecture that the package has."""
        import open_clip

        architecture, weights = self.in_open_clip
        assert weights is not None  # of an architecture it is a text
        setting = f"student.source is {self.name!r}: its"
        choice(f"{setting} architecture", architecture, open_clip.list_models())
        model_cfg = open_clip.get_model_config(architecture)
        if os.path.isfile(weights):
            return {"model_cfg": model_cfg}
        published = open_clip.get_pretrained_cfg(architecture, weights)
        if not published:
            tags = open_clip.list_pretrained_tags_by_model(architecture)
            choice(f"{setting} file or tag", weights, tags)
        quick_gelu = bool(published.get("quick_gelu"))
        if quick_gelu != bool(model_cfg.get("quick_gelu")):
            fitting = architecture.removesuffix("-quickgelu") + ("-quickgelu" if quick_gelu else "")
            name = f"{ARCHITECTURE_PREFIX}{fitting}@{weights}"
            raise self.error(f"trained with another activation: give {name}")
        return {"model_cfg": model_cfg, "preprocess_cfg": published}


# --- the settings of a student that starts from a source


def with_source_settings(overrides: Mapping[str, Section]) -> Sections:
    """Return the user's settings together with those that `student.source` decides.

    The user may choose another size of pictures or length of texts if the source's positions can be
    resampled. Raises `UserError`.
    """
    settings = {section: dict(values) for section, values in overrides.items()}
    student = settings.get("student", {})
    if "source_config" in student:
        raise UserError("student.source_config is filled from student.source: give that one alone")
    name = student.get("source")
    if not name or not isinstance(name, str):  # which is refused with the other settings
        return settings
    source = ModelSource(name)
    data = settings.get("data", {})
    free_keys = {*TRAINING_SETTINGS, "dropout" if source.is_ds_cmli else "shared_blocks"}
    decided = run_settings(source, data) if source.is_ds_cmli else library_settings(source, data)
    for section, values in decided.items():
        chosen = settings.setdefault(section, {})
        for key, value in values.items():
            chosen.setdefault(key, value)
            if key not in free_keys:
                need = f"student.source {name!r} has {value!r}: leave it out"
                check(chosen[key] == value, f"{section}.{key}", chosen[key], need)
    temperature = settings.get("loss", {}).get("init_temperature")
    need = f"training starts with that of student.source {name!r}: leave it out"
    check(temperature is None, "loss.init_temperature", temperature, need)
    return settings


def evaluation_config(source: ModelSource) -> Config:
    """Return the configuration to evaluate a model that is no run. Raises `UserError`."""
    decided = with_source_settings({"student": {"source": source.name}})
    if source.is_ds_cmli:
        losses = dict(source.config.get("losses") or {"global": 1.0})  # a distillation has none
    else:
        losses = {temperature_loss(source.config): 1.0, "cmli": 1.0}
    return Config.from_dict({**decided, "loss": {"weights": losses}})


def run_settings(source: ModelSource, chosen: Section) -> Sections:
    """Return the settings by which a run or an export of this package is built again.

    `chosen`: the user's settings of `data`.
    """
    with source.blame("its config.json is damaged"):
        settings = source.config["settings"]
        student = {**settings["student"], "source": source.name}
        data = {**settings["data"], "tokenizer": source.name}
        if data["padding"] == "longest":
            # A text that is cut off earlier is still a text that the model was trained on.
            length = _number(chosen, "context_length", data["context_length"])
            data["context_length"] = min(length, data["context_length"])
    if source.is_local:  # the name may be that of a file of weights
        data["tokenizer"] = str(source.local_folder)
    return {"student": student, "data": data}


def library_settings(source: ModelSource, chosen: Section) -> Sections:
    """Return the settings of a model of another library; `chosen`: the user's of `data`."""
    model_type = source.config.get("model_type")
    choice(f"student.source is {source.name!r}: its type", model_type, [*DUAL, "ds_cmli"])
    with source.blame("this package cannot train it"):  # for what its files hold
        read = open_clip_settings if model_type == "open_clip" else transformers_settings
        settings = read(source, chosen)
    settings["student"] |= {
        **NO_TRAINING,
        "image_model": f"{model_type}_vision_model",
        "image_weights": "source",
        "image_overrides": {},
        "text_model": f"{model_type}_text_model",
        "text_weights": "source",
        "text_overrides": {},
        "layers": None,
        "shared_blocks": 0,
    }
    return settings


def transformers_settings(source: ModelSource, chosen: Section) -> Sections:
    """Return the settings that a CLIP or SigLIP of transformers decides.

    `source_config` is the library's configuration, with the sizes of the student; `embed_dim` the
    width of the joint space. Raises errors of the library, and ValueError.
    """
    from transformers import CONFIG_MAPPING, AutoImageProcessor

    model_type = source.config["model_type"]
    if source.weights is not None:
        raise ValueError("it is a file of weights: of a model of transformers, give its folder")
    with loading(hub=False):
        config: Any = CONFIG_MAPPING[model_type].from_dict(source.config)
        processor = AutoImageProcessor.from_pretrained(source.json_folder, trust_remote_code=False)
    pictures = processor.to_dict()
    vision = config.vision_config
    text = config.text_config
    resize = _resize_of(pictures, vision.image_size)
    embed_dim = config.projection_dim if model_type == "clip" else vision.hidden_size
    if model_type == "siglip" and text.projection_size != embed_dim:
        raise ValueError(f"its texts are not projected to the {embed_dim} numbers of its pictures")
    # SigLIP attends to its padding, so another length would change the features of every text.
    padding = "longest" if model_type == "clip" else "full"
    context_length = text.max_position_embeddings
    if padding == "longest":
        context_length = _number(chosen, "context_length", context_length)
    vision.image_size = _number(chosen, "image_size", vision.image_size)
    text.max_position_embeddings = max(context_length, text.max_position_embeddings)
    source_config = json.loads(config.to_json_string(), object_pairs_hook=_without_irrelevant)
    source_config["mean"] = list(pictures["image_mean"])
    source_config["std"] = list(pictures["image_std"])
    data = {
        "image_size": vision.image_size,
        "resize": resize,
        "interpolation": PILLOW[pictures["resample"]],
        "tokenizer": source.name,
        "context_length": context_length,
        "padding": padding,
    }
    return {"student": {"source_config": source_config, "embed_dim": embed_dim}, "data": data}


def _resize_of(pictures: JsonObject, side: int) -> str:
    """Return `data.resize` for the settings of an image processor; `side`: the model's pixels."""
    square = {"height": side, "width": side}
    shortest = {"shortest_edge": side}
    crop = pictures["crop_size"] if pictures.get("do_center_crop") else None
    supported = ((square, None), (square, square), (shortest, square))
    steps = [pictures[name] for name in ("do_resize", "do_rescale", "do_normalize")]
    size = pictures["size"]
    if not ((size, crop) in supported and all(steps) and pictures["resample"] in PILLOW):
        raise ValueError(f"its pictures are not resized to {side} x {side} and normalised as here")
    return "shortest" if size == shortest else "squash"


def _without_irrelevant(pairs: list[tuple[str, object]]) -> JsonObject:
    return {name: value for name, value in pairs if name not in IRRELEVANT_FIELDS}


def open_clip_settings(source: ModelSource, chosen: Section) -> Sections:
    """Return the settings that a model of open_clip decides, as `transformers_settings`."""
    from open_clip import CLIPTextCfg, CLIPVisionCfg
    from open_clip.transform import PreprocessCfg, merge_preprocess_dict
    from open_clip.utils import to_2tuple

    model_cfg = deepcopy(source.config["model_cfg"])
    vision_cfg = model_cfg["vision_cfg"]
    text_cfg = model_cfg["text_cfg"]
    vision = CLIPVisionCfg(**vision_cfg)
    text = CLIPTextCfg(**text_cfg)
    _check_towers(vision, text)
    # A CoCa keeps its two towers alone. What acts in open_clip's own training is left out.
    model_cfg.pop("multimodal_cfg", None)
    for name in ("output_tokens", "patch_dropout", "timm_drop", "timm_drop_path"):
        vision_cfg.pop(name, None)
        text_cfg.pop(name, None)
    vision_cfg["timm_model_pretrained"] = False
    pictures: Any = merge_preprocess_dict(PreprocessCfg(), source.config["preprocess_cfg"])
    (side,) = {*to_2tuple(vision.image_size)}
    image_size = _number(chosen, "image_size", side)
    if image_size != side:
        vision_cfg["image_size"] = image_size
    # Towers whose features depend on the padding need all of it.
    attends = text.no_causal_mask or text.embed_cls or text.pool_type == "last"
    context_length = text.context_length
    if not attends:
        context_length = _number(chosen, "context_length", context_length)
    if context_length > text.context_length:
        text_cfg["context_length"] = context_length
    source_config = {
        "model_type": "open_clip",
        "model_cfg": model_cfg,
        "mean": [*pictures["mean"]],
        "std": [*pictures["std"]],
    }
    if name := text.hf_model_name:  # open_clip gives its name alone
        from transformers import AutoConfig

        with source.blame("its text encoder"), loading(not Path(name).is_dir(), name):
            config = AutoConfig.from_pretrained(name, trust_remote_code=False)
        source_config["text_config"] = config.to_diff_dict() | {"use_cache": False}
        text_cfg["hf_model_pretrained"] = False
    tokenizer = DEFAULT_TOKENIZER
    if text.hf_tokenizer_name or text.tokenizer_kwargs:
        tokenizer, _ = source.in_open_clip
        if source.name.startswith(ARCHITECTURE_PREFIX):
            tokenizer = f"{ARCHITECTURE_PREFIX}{tokenizer}"
    data = {
        "image_size": image_size,
        "resize": f"{pictures['resize_mode']}_pillow",
        # "random" is one of several in its training, and bicubic elsewhere.
        "interpolation": pictures["interpolation"].replace("random", "bicubic"),
        "tokenizer": tokenizer,
        "context_length": context_length,
        "padding": "full" if attends else "longest",
    }
    embed_dim = int(model_cfg["embed_dim"])
    return {"student": {"source_config": source_config, "embed_dim": embed_dim}, "data": data}


def _check_towers(vision: Any, text: Any) -> None:
    if (
        isinstance(vision.attentional_pool, str)
        or vision.timm_pool not in ("", "avg", "map", "token")
        or "none" in (vision.pool_type, text.pool_type, text.proj_type)
    ):
        raise ValueError("a tower is pooled or projected otherwise than docs/finetune.md says")


def _number(chosen: Section, key: str, usual: int) -> int:
    """Return the user's number, or else `usual`; a value of another type is refused later."""
    value = chosen.get(key)
    return value if type(value) is int else usual
