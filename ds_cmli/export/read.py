"""Loads an exported folder as the configuration and the student that the rest of the package works
with.
"""

from pathlib import Path

from ds_cmli.checkpoint.weights import load_weights
from ds_cmli.common.errors import UserError
from ds_cmli.config.schema import Config
from ds_cmli.config.validation import parse_json
from ds_cmli.losses.objective import Objective

WEIGHTS = "model.safetensors"


def is_exported(folder: Path) -> bool:
    try:
        content = parse_json((folder / "config.json").read_text())
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and content.get("model_type") == "ds_cmli"


def load_exported(folder: Path) -> tuple[Config, Objective]:
    """The configuration, as far as the export holds it, and the student with its losses over pairs.

    Raises:
        UserError: the folder is damaged.
    """
    from ds_cmli.export import CMLIConfig
    from ds_cmli.export.modeling import build_student

    try:
        exported = CMLIConfig.from_pretrained(folder)
        data = {"source": "not named", **exported.settings["data"]}  # earlier exports name none
        given = {**exported.settings, "data": data, "loss": {"weights": dict(exported.losses)}}
        config = Config.from_dict(given)
        student = build_student(exported)
    except (OSError, LookupError, ValueError, UserError) as error:
        raise UserError(
            f"{str(folder)!r}: its config.json is damaged, or of another version: {error}"
        ) from None
    objective = Objective(student, config.loss)
    load_weights(folder, objective, WEIGHTS, "the model")
    return config, objective
