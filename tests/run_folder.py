"""A run's folder as a training leaves it, with random weights."""

import json
from pathlib import Path

import torch

from ds_cmli.checkpoint.weights import write_weights
from ds_cmli.config.presets import load_preset
from ds_cmli.config.schema import Config
from ds_cmli.data.tokens import CaptionTokenizer, tokenizer_of
from ds_cmli.engine import build_models
from ds_cmli.losses.objective import Objective
from ds_cmli.models.hf import WEIGHTS, write_config


def write_run(folder: Path, losses: tuple[str, ...] = ("global", "cmli")) -> Path:
    """In the sizes of `tiny`. Its tokenizer is the built-in one."""
    config = load_preset("tiny", {"loss": {"weights": dict.fromkeys(losses, 1.0)}})
    torch.manual_seed(0)
    words = tokenizer_of(config.data)
    objective, _ = build_models(config, words.vocab_size, pad_id=words.pad_id)
    return save_run(folder, config, objective, words)


def save_run(folder: Path, config: Config, objective: Objective, words: CaptionTokenizer) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    kept = objective.state_dict().keys()
    tensors = {name: value.detach().clone() for name, value in objective.named_parameters()}
    tensors = {name: value for name, value in tensors.items() if not name.startswith("width_head.")}
    tensors |= {name: value.clone() for name, value in objective.named_buffers() if name in kept}
    write_weights(tensors, folder / WEIGHTS)
    write_config(folder, config, objective.student, words)
    (folder / "run.json").write_text(json.dumps({"config": config.to_dict()}))
    return folder
