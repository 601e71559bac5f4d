"""The settings that build a trained student anywhere: all sizes, and no weights or paths of this
machine.
"""

import inspect
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ds_cmli.config import registry
from ds_cmli.config.schema import Config, DataConfig
from ds_cmli.models.student import Student
from ds_cmli.models.transformers_model import UNDECLARED, without_effect

DEMO = "demo"  # `DataConfig.source` of the demo


def sources(data: DataConfig) -> list[str]:
    """What a model was trained on, by names without the paths of this machine."""
    given = [data.source] if isinstance(data.source, str) else data.source
    if given == [DEMO]:
        return given
    names = [Path(source).name for source in given]
    return [f"./{name}" if name == DEMO else name for name in names]


def portable(config: Config, student: Student) -> dict[str, Any]:
    """Sections of the configuration that build the same student, with random weights, and prepare
    the same inputs.
    """
    backbone: Any = student.text
    text = backbone.model.config
    settings = asdict(config.student) | {
        "image_weights": "random",
        "image_backbone": _name(registry.IMAGE, student.image),
        "text_weights": "random",
        "text_backbone": _name(registry.TEXT, student.text),
        "text_model": text.model_type,
        "text_overrides": _sizes(text),
    }
    data = {
        name: getattr(config.data, name) for name in ("image_size", "context_length", "max_pixels")
    }
    return {"student": settings, "data": data | {"source": sources(config.data)}}


def _name(table: dict[str, registry.BackboneEntry], backbone: Any) -> str:
    return next(name for name in table if type(backbone) is registry.load(table[name]))


def _sizes(config: Any) -> dict[str, Any]:
    """The fields that have an effect and differ from the defaults of the model's family."""
    usual = type(config)().to_dict()
    found = json.loads(json.dumps(config.to_dict()))
    names = {*inspect.signature(type(config)).parameters, *UNDECLARED.get(config.model_type, ())}
    return {
        name: found[name]
        for name in sorted(names & found.keys())
        if found[name] != usual.get(name) and without_effect(type(config), name) is None
    }
