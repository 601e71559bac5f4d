"""`student.source`: a dual encoder as a whole, whose own files decide the settings of a student.

It is a model of transformers (`dual.py`), by a folder or its name on the hub, a model of open_clip
(`open_clip.py`), or the folder of a run or of an export of this package.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ds_cmli.common.errors import UserError
from ds_cmli.common.json_text import JsonObject, Section, read
from ds_cmli.common.pretrained import loading, reason
from ds_cmli.config import open_clip
from ds_cmli.config.registry import DUAL, of_dual
from ds_cmli.config.schema import Config, Sections, StudentConfig, shown

HUB_NAME = re.compile(r"(?=.{1,96}$)\w[\w.-]*(/\w[\w.-]*)?")
EXPORT = "ds_cmli"  # the type of a model of this package
CONFIG, RUN = "config.json", "run.json"  # of a model; the settings of a run
# Of a run, what says how pictures and texts are prepared.
OF_DATA = ("image_size", "resize", "interpolation", "context_length", "padding")
# Settings of a student that are of one training, and not of its architecture.
OF_TRAINING = {
    "freeze_image": 0,
    "freeze_text": 0,
    "lora": {},
    "lora_rank": 8,
    "lora_alpha": 16,
    "dropout": 0.0,
}


@dataclass(frozen=True)
class Source:
    """The files of a source, of a folder or on the hub."""

    name: str  # the value of student.source

    @property
    def path(self) -> Path:
        """The folder of the model, of which `name` may also be a file of weights."""
        path = Path(self.place).expanduser()
        return path.parent if path.suffix == ".safetensors" and os.path.isfile(path) else path

    @property
    def place(self) -> str:
        """The name without a prefix of open_clip's."""
        return self.name.removeprefix(open_clip.LOCAL).removeprefix(open_clip.HUB)

    @property
    def files(self) -> str:
        """What names its files here, if any are: the folder, or the weights of an architecture."""
        if self.name.startswith(open_clip.NAMED):
            return open_clip.Named.of(self.name).weights
        return self.place

    @property
    def weights(self) -> str | None:
        """The name of its file of weights; None: the usual one."""
        path = Path(self.place).expanduser()
        return None if path == self.path else path.name

    @property
    def local(self) -> bool:
        # Also of a name that is too long for a path.
        return not self.name.startswith(open_clip.HUB) and os.path.exists(self.path)

    def error(self, problem: str) -> UserError:
        return UserError(f"student.source is {shown(self.name)}: {problem}")

    def json(self, name: str) -> JsonObject | None:
        """The content of a JSON file; None if the source has none of that name.

        Raises:
            UserError: it cannot be read, or the hub cannot be reached.
        """
        file = self.path / name
        if not self.local:
            downloaded = self._downloaded(name)
            if downloaded is None:
                return None
            file = downloaded
        if not file.is_file():
            return None
        try:
            return read(file, dict)
        except (OSError, ValueError) as error:
            raise self.error(f"its {name} cannot be read: {error}") from None

    def _downloaded(self, name: str) -> Path | None:
        from huggingface_hub import hf_hub_download, try_to_load_from_cache
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

        try:
            with loading(hub=True):
                return Path(hf_hub_download(self.place, name))
        except LocalEntryNotFoundError:
            kinds = CONFIG, open_clip.CONFIG
            if any(isinstance(try_to_load_from_cache(self.place, kind), str) for kind in kinds):
                return None  # the model is there, and has no such file
            raise self.error(
                "no folder, and the model hub cannot be reached: where it can, "
                f"`hf download {self.place} --local-dir FOLDER`; then give FOLDER"
            ) from None
        except EntryNotFoundError:
            return None
        except Exception as error:  # the hub's client raises its own
            problem = f"no folder, and no model of the hub ({reason(error)})"
            raise self.error(f"{problem}: give a local folder or OWNER/NAME") from None

    @cached_property
    def config(self) -> JsonObject:
        """The content of its `config.json`, or what `open_clip.described` has in its place.

        Raises `UserError` if there is neither.
        """
        if self.name.startswith(open_clip.NAMED):
            return open_clip.described(self)
        if self.local and not self.path.is_dir():
            raise self.error("a file: give the folder of the model, with its config.json")
        of_hub = HUB_NAME.fullmatch(self.place) and not self.name.startswith(open_clip.LOCAL)
        if not (self.local or of_hub):
            raise self.error("no such file or folder")
        if open_clip.is_marked(self.name):
            return open_clip.described(self)
        content = None
        try:
            content = self.json(CONFIG)
        except UserError:
            if self.local:
                raise
            # Without a network, the hub's cache may have the file of open_clip alone.
        # Models that both libraries load have both files.
        own = content is not None and content.keys() & {"model_type", "config"}
        if not own and self.json(open_clip.CONFIG) is not None:
            return open_clip.described(self)
        if content is None:
            raise self.error("no config.json there: give the folder of a model or of a run")
        return content

    @property
    def is_run(self) -> bool:
        """Whether it is a run or an export of this package."""
        return self.config.get("model_type") == EXPORT

    @property
    def has_own_data(self) -> bool:
        """Whether it is a run, whose settings say what it was trained on."""
        return self.local and (self.path / RUN).is_file()


def applied(overrides: Mapping[str, Section]) -> Sections:
    """The user's settings with those that `student.source` decides, if it is given.

    Raises:
        UserError: the source cannot be read, or a setting of the user's contradicts it.
    """
    name = overrides.get("student", {}).get("source")
    if "source_config" in overrides.get("student", {}):
        raise UserError("student.source_config is filled from student.source: give that one alone")
    out = {section: dict(values) for section, values in overrides.items()}
    if not name:
        return out
    if not isinstance(name, str):
        raise UserError(f"student.source is {shown(name)}: give a folder or a name of the hub")
    source = Source(name)
    is_run = source.is_run
    decided = _of_run(source) if is_run else _of_library(source)
    free = set(OF_TRAINING)
    if not is_run:
        free = free - {"dropout"} | {"shared_blocks"}
    for section, values in decided.items():
        given = out.setdefault(section, {})
        for key, value in values.items():
            if key in given and key not in free and not _allowed(key, given[key], decided):
                raise UserError(
                    f"{section}.{key} is {shown(given[key])}, and student.source {name!r} has "
                    f"{shown(value)}: leave it out"
                )
            given.setdefault(key, value)
    temperature = out.get("loss", {}).get("init_temperature")
    if temperature is not None:
        raise UserError(
            f"loss.init_temperature is {shown(temperature)}, and training starts with that of "
            f"student.source {name!r}: leave it out"
        )
    return out


def to_evaluate(source: Source) -> Config:
    """The configuration by which a model that is no run is evaluated. Raises `UserError`."""
    decided = applied({"student": {"source": source.name}})
    losses = dict(source.config.get("losses") or {"global": 1.0})  # a distillation has none
    if not source.is_run:
        losses = {of_dual("config", source.config).loss_of(source.config): 1.0, "cmli": 1.0}
    return Config.from_dict({**decided, "loss": {"weights": losses}})


def _allowed(key: str, value: object, decided: Sections) -> bool:
    """Whether the user's value of a setting that the source decides goes with it."""
    own = {**decided["student"], **decided["data"]}[key]
    # Texts that are not padded may be shorter: what is computed of them is the same.
    if key == "context_length" and decided["data"]["padding"] == "longest":
        return isinstance(value, int) and value <= own
    return value == own


def _of_run(source: Source) -> Sections:
    """The settings by which a run or an export of this package is built again."""
    settings: Any = source.config.get("settings")
    if not isinstance(settings, dict):
        raise source.error("its config.json is damaged: it has no settings")
    config = Config.from_dict(settings)
    student = {name: getattr(config.student, name) for name in StudentConfig.__annotations__}
    data = {name: getattr(config.data, name) for name in OF_DATA}
    return {
        "student": student | OF_TRAINING | {"source": source.name},
        "data": data | {"tokenizer": str(source.path) if source.local else source.name},
    }


def _of_library(source: Source) -> Sections:
    """The settings of a model of another library."""
    kind = source.config.get("model_type")
    if kind not in list(DUAL):  # a file of others may hold anything
        known = ", ".join(DUAL)
        raise source.error(
            f"a model of the type {kind!r}: give one of {known}, a run or an export of this package"
        )
    own, embed_dim, data = of_dual("config", source.config).sections(source)
    student: dict[str, object] = {
        **OF_TRAINING,
        "source_config": own,
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
