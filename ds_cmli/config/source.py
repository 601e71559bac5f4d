"""`student.source`: a dual encoder as a whole, whose own files decide the settings of a student.

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

from ds_cmli.config.schema import Config, Sections, StudentConfig, check, choice
from ds_cmli.errors import UserError, blame
from ds_cmli.files import JsonObject, Section, read_json
from ds_cmli.pretrained import loading

RUN = "run.json"  # the settings of a run
CONFIG, OPEN_CLIP = "config.json", "open_clip_config.json"  # of a model
NAMED, LOCAL, HUB = "open_clip:", "local-dir:", "hf-hub:"  # the last two as in open_clip
DEFAULT_TOKENIZER = "open_clip"  # the BPE that comes with open_clip
# Settings of a student that are of one training, and not of its architecture.
FREE = ("freeze_image", "freeze_text", "lora", "lora_rank", "lora_alpha")
OF_TRAINING = {name: getattr(StudentConfig(), name) for name in FREE} | {"dropout": 0.0}
# The types of other libraries' dual encoders, and the module in `models` that builds them.
DUAL = {"clip": "dual", "siglip": "dual", "open_clip": "open_clip"}
# Of the fields of transformers' models, what decides nothing.
NOISE = ("_name_or_path", "transformers_version", "dtype", "architectures")
PILLOW = {2: "bilinear", 3: "bicubic"}  # interpolations of transformers


def is_marked(name: str) -> bool:
    """Whether a name says by its beginning that it is open_clip's."""
    return name.startswith((NAMED, LOCAL, HUB))


def loss_of(own: JsonObject) -> str:
    """The loss whose temperature a model has, by `StudentConfig.source_config`."""
    biased = own.get("model_cfg", {}).get("init_logit_bias") is not None  # in open_clip
    return "global_sigmoid" if biased or own["model_type"] == "siglip" else "global"


class Source:
    """The files of a source, of a folder or on the hub."""

    def __init__(self, name: str):
        """`name`: the value of `student.source`."""
        self.name = name
        self.weights: str | None = None
        self.place = name.removeprefix(LOCAL).removeprefix(HUB)
        self.path = Path(self.place).expanduser()  # the folder of the model
        # A name may be too long for a path, and may give the file of weights, if not the usual one.
        if self.path.suffix == ".safetensors" and os.path.isfile(self.path):
            self.path, self.weights = self.path.parent, self.path.name
        self.local = not name.startswith(HUB) and os.path.exists(self.path)

    @property
    def has_own_data(self) -> bool:
        """Whether it is a run, whose settings say what it was trained on."""
        return self.local and (self.path / RUN).is_file()

    @property
    def is_run(self) -> bool:
        """Whether it is a run or an export of this package."""
        return self.config.get("model_type") == "ds_cmli"

    def error(self, problem: str) -> UserError:
        return UserError(f"student.source is {self.name!r}: {problem}")

    def blame(self, problem: str) -> AbstractContextManager[None]:
        return blame(str(self.error(problem)))

    @cached_property
    def folder(self) -> Path:
        """Where its JSON files are; those of the hub are fetched into its cache."""
        if self.local or self.name.startswith(LOCAL):
            return self.path
        from huggingface_hub import snapshot_download

        with self.blame("no such file or folder, nor on the hub"), loading(hub=True):
            names = [CONFIG, OPEN_CLIP, "preprocessor_config.json", "processor_config.json"]
            return Path(snapshot_download(self.place, allow_patterns=names))

    def json(self, name: str) -> JsonObject:
        """The content of a JSON file; empty if the source has none of that name."""
        if not (self.folder / name).is_file():
            return {}
        with self.blame(f"its {name} cannot be read"):
            return read_json(self.folder / name)

    @cached_property
    def config(self) -> JsonObject:
        """Its `config.json`; of open_clip `model_cfg` and `preprocess_cfg`. Raises `UserError`."""
        content = {} if is_marked(self.name) else self.json(CONFIG)
        if "model_type" in content:  # models that both libraries load have both files
            return content
        named = self.name.startswith(NAMED)
        content = {} if named else self.json(OPEN_CLIP)
        if not named and "model_cfg" not in content:
            raise self.error(f"no {CONFIG} or {OPEN_CLIP} there: give the folder of a model or run")
        with self.blame("a model of open_clip: pip install 'ds-cmli[open_clip]'"):
            import_module("open_clip")
        content = self.published() if named else content
        return {"preprocess_cfg": {}, **content, "model_type": "open_clip"}

    @property
    def in_open_clip(self) -> tuple[str, str | None]:
        """What `open_clip.create_model` calls the model, and its weights: a file or a tag."""
        if self.name.startswith(NAMED):
            architecture, _, weights = self.name.removeprefix(NAMED).partition("@")
            file = os.path.expanduser(weights)
            return architecture, file if os.path.isfile(file) else weights
        return self.name if is_marked(self.name) else f"{(HUB, LOCAL)[self.local]}{self.name}", None

    def published(self) -> JsonObject:
        """`model_cfg` and `preprocess_cfg` of an architecture that the package has."""
        import open_clip

        name, weights = map(str, self.in_open_clip)
        what = f"student.source is {self.name!r}: its"
        model = open_clip.get_model_config(name)
        if model is None:
            choice(f"{what} architecture", name, open_clip.list_models())
        if os.path.isfile(weights):
            return {"model_cfg": model}
        how = open_clip.get_pretrained_cfg(name, weights)
        if not how:
            choice(f"{what} file or tag", weights, open_clip.list_pretrained_tags_by_model(name))
        if bool(how.get("quick_gelu")) != bool(model.get("quick_gelu")):
            other = name.removesuffix("-quickgelu") + "-quickgelu" * bool(how.get("quick_gelu"))
            raise self.error(f"trained with another activation: give {NAMED}{other}@{weights}")
        return {"model_cfg": model, "preprocess_cfg": how}


def applied(overrides: Mapping[str, Section]) -> Sections:
    """The user's settings with those that `student.source` decides. Raises `UserError`."""
    out = {section: dict(values) for section, values in overrides.items()}
    student = out.get("student", {})
    if "source_config" in student:
        raise UserError("student.source_config is filled from student.source: give that one alone")
    name = student.get("source")
    if not name or not isinstance(name, str):  # which is refused with the other settings
        return out
    source = Source(name)
    decided = of_run(source) if source.is_run else of_library(source)
    free = {*FREE, "dropout" if source.is_run else "shared_blocks"}
    # Of texts that are padded to their full length, shorter ones would be other ones.
    shorter = decided["data"].get("padding") == "longest"
    for section, values in decided.items():
        given = out.setdefault(section, {})
        for key, value in values.items():
            mine = given.setdefault(key, value)
            fits = mine == value or key in free
            if key == "context_length" and shorter and isinstance(mine, int):
                fits = mine <= value
            need = f"student.source {name!r} has {value!r}: leave it out"
            check(fits, f"{section}.{key}", mine, need)
    temperature = out.get("loss", {}).get("init_temperature")
    need = f"training starts with that of student.source {name!r}: leave it out"
    check(temperature is None, "loss.init_temperature", temperature, need)
    return out


def to_evaluate(source: Source) -> Config:
    """The configuration by which a model that is no run is evaluated. Raises `UserError`."""
    decided = applied({"student": {"source": source.name}})
    if source.is_run:
        losses = dict(source.config.get("losses") or {"global": 1.0})  # a distillation has none
    else:
        losses = {loss_of(source.config): 1.0, "cmli": 1.0}
    return Config.from_dict({**decided, "loss": {"weights": losses}})


def of_run(source: Source) -> Sections:
    """The settings by which a run or an export of this package is built again."""
    with source.blame("its config.json is damaged"):
        settings = source.config["settings"]
        student = {**settings["student"], "source": source.name}
        data = {**settings["data"], "tokenizer": source.name}
    if source.local:  # the name may be that of a file of weights
        data["tokenizer"] = str(source.path)
    return {"student": student, "data": data}


def of_library(source: Source) -> Sections:
    """The settings of a model of another library."""
    kind = source.config.get("model_type")
    choice(f"student.source is {source.name!r}: its type", kind, [*DUAL, "ds_cmli"])
    with source.blame("this package cannot train it"):  # of what its files hold
        decide = of_open_clip if kind == "open_clip" else of_transformers
        own, embed_dim, data = decide(source)
    student: dict[str, object] = {
        **OF_TRAINING,
        "source_config": {"model_type": kind, **own},
        "image_model": f"{kind}_vision_model",
        "image_weights": "source",
        "image_overrides": {},
        "text_model": f"{kind}_text_model",
        "text_weights": "source",
        "text_overrides": {},
        "layers": None,
        "shared_blocks": 0,
        "embed_dim": embed_dim,
    }
    return {"student": student, "data": data}


def of_transformers(source: Source) -> tuple[JsonObject, int, JsonObject]:
    """Of CLIP or SigLIP: `source_config`, the width of the joint space, the settings of `data`."""
    from transformers import CONFIG_MAPPING, AutoImageProcessor

    kind = source.config["model_type"]
    if source.weights is not None:
        raise ValueError("it is a file of weights: of a model of transformers, give its folder")
    with loading(hub=False):
        config: Any = CONFIG_MAPPING[kind].from_dict(source.config)
        processor = AutoImageProcessor.from_pretrained(source.folder, trust_remote_code=False)
    pictures, side = processor.to_dict(), config.vision_config.image_size
    square, shortest = {"height": side, "width": side}, {"shortest_edge": side}
    cut = pictures["crop_size"] if pictures.get("do_center_crop") else None
    fits = (pictures["size"], cut) in ((square, None), (square, square), (shortest, square))
    steps = [pictures[name] for name in ("do_resize", "do_rescale", "do_normalize")]
    if not (fits and all(steps) and pictures["resample"] in PILLOW):
        raise ValueError(f"its pictures are not resized to {side} x {side} and normalised as here")
    own = json.loads(
        config.to_json_string(),
        object_pairs_hook=lambda pairs: {key: value for key, value in pairs if key not in NOISE},
    )
    own |= {name: list(pictures[f"image_{name}"]) for name in ("mean", "std")}
    embed_dim = config.projection_dim if kind == "clip" else config.vision_config.hidden_size
    if kind == "siglip" and config.text_config.projection_size != embed_dim:
        raise ValueError(f"its texts are not projected to the {embed_dim} numbers of its pictures")
    data = {
        "image_size": side,
        "resize": "shortest" if pictures["size"] == shortest else "squash",
        "interpolation": PILLOW[pictures["resample"]],
        "tokenizer": source.name,
        "context_length": config.text_config.max_position_embeddings,
        "padding": "longest" if kind == "clip" else "full",
    }
    return own, embed_dim, data


def of_open_clip(source: Source) -> tuple[JsonObject, int, JsonObject]:
    """What a model of open_clip decides, as `of_transformers`."""
    import open_clip
    from open_clip.transform import PreprocessCfg, merge_preprocess_dict
    from open_clip.utils import to_2tuple

    model = deepcopy(source.config["model_cfg"])
    vision = open_clip.CLIPVisionCfg(**model["vision_cfg"])
    text = open_clip.CLIPTextCfg(**model["text_cfg"])
    pictures: Any = merge_preprocess_dict(PreprocessCfg(), source.config["preprocess_cfg"])
    (side,) = {*to_2tuple(vision.image_size)}
    if (
        isinstance(vision.attentional_pool, str)
        or vision.timm_pool not in ("", "avg", "map", "token")
        or "none" in (vision.pool_type, text.pool_type, text.proj_type)
    ):
        raise ValueError("a tower is pooled or projected otherwise than docs/finetune.md says")
    # Of a CoCa the two towers alone; and without what acts in open_clip's own training.
    model.pop("multimodal_cfg", None)
    for name in ("output_tokens", "patch_dropout", "timm_drop", "timm_drop_path"):
        for tower in ("vision_cfg", "text_cfg"):
            model[tower].pop(name, None)
    model["vision_cfg"]["timm_model_pretrained"] = False
    own: JsonObject = {"model_cfg": model, **{key: [*pictures[key]] for key in ("mean", "std")}}
    if name := text.hf_model_name:  # open_clip names it alone
        from transformers import AutoConfig

        with source.blame("its text encoder"), loading(hub=not Path(name).is_dir()):
            config = AutoConfig.from_pretrained(name, trust_remote_code=False)
        own["text_config"] = config.to_diff_dict() | {"use_cache": False}
        model["text_cfg"]["hf_model_pretrained"] = False
    tokenizer = DEFAULT_TOKENIZER
    if text.hf_tokenizer_name or text.tokenizer_kwargs:
        named = NAMED if source.name.startswith(NAMED) else ""
        tokenizer = named + source.in_open_clip[0]
    # Towers whose features depend on the padding need all of it.
    full = text.no_causal_mask or text.embed_cls or text.pool_type == "last"
    data = {
        "image_size": side,
        "resize": f"{pictures['resize_mode']}_pillow",
        # "random" is one of several in its training, and bicubic else.
        "interpolation": pictures["interpolation"].replace("random", "bicubic"),
        "tokenizer": tokenizer,
        "context_length": text.context_length,
        "padding": "full" if full else "longest",
    }
    return own, int(model["embed_dim"]), data
