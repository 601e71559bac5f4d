"""A run's folder as a training leaves it, with random weights in the sizes of `tiny`."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from ds_cmli.config.presets import load_preset
from ds_cmli.data.tokens import load_tokenizer
from ds_cmli.engine import build_models


def write_run(folder: Path, losses: tuple[str, ...] = ("global", "cmli")) -> Path:
    """Its tokenizer is the built-in one."""
    config = load_preset("tiny", {"loss": {"weights": dict.fromkeys(losses, 1.0)}})
    torch.manual_seed(0)
    objective, _ = build_models(config, load_tokenizer("builtin", config.data.context_length).vocab_size)
    save_file({k: v.contiguous() for k, v in objective.state_dict().items()}, folder / "student.safetensors")
    (folder / "config.json").write_text(json.dumps({"config": config.to_dict()}))
    return folder
