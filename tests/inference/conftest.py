"""A run's folder as a training leaves it, with random weights, and pictures to embed."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from ds_cmli.config.presets import load_preset
from ds_cmli.data.tokens import load_tokenizer
from ds_cmli.engine import build_models


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    config = load_preset("tiny", {"loss": {"weights": {"global": 1.0, "cmli": 1.0}}})
    torch.manual_seed(0)
    objective, _ = build_models(config, load_tokenizer("builtin", config.data.context_length).vocab_size)
    save_file(
        {name: value.contiguous() for name, value in objective.state_dict().items()}, folder / "student.safetensors"
    )
    (folder / "config.json").write_text(json.dumps({"config": config.to_dict()}))
    return folder


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    noise = np.random.default_rng(0)
    for i in range(12):
        (folder / str(i % 2)).mkdir(exist_ok=True)
        small = noise.integers(0, 256, (4, 4, 3), np.uint8)
        Image.fromarray(small).resize((80, 60)).save(folder / str(i % 2) / f"{i:02}.png")
    return folder
