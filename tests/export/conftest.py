"""Run folders as trainings leave them, with random weights in small sizes, and what is exported of one."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from ds_cmli.config.presets import load_preset
from ds_cmli.data.tokens import load_tokenizer
from ds_cmli.engine import build_models
from ds_cmli.export.__main__ import command

TEXTS = ["a red car", "two dogs,sitting under a tree", "x"]


def make_run(folder, student=None, losses=("global", "cmli"), data=None):
    weights = {name: 1.0 + i for i, name in enumerate(losses)}
    config = load_preset("tiny", {"loss": {"weights": weights}, "student": student or {}, "data": data or {}})
    torch.manual_seed(0)
    words = load_tokenizer("builtin", config.data.context_length)
    objective, _ = build_models(config, words.vocab_size, special=words.special)
    for parameter in objective.student.shared.parameters():  # which start as the identity
        torch.nn.init.normal_(parameter, std=0.2)
    tensors = {name: value.detach().clone() for name, value in objective.named_parameters()}
    buffers = {name: value.clone() for name, value in objective.named_buffers() if name in objective.state_dict()}
    folder.mkdir(exist_ok=True)
    save_file({**tensors, **buffers}, folder / "student.safetensors")
    (folder / "config.json").write_text(json.dumps({"config": config.to_dict()}))
    return folder


def export(run, folder, *options):
    command.main([str(run), str(folder), *options], standalone_mode=False)
    return folder


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="session")
def exported(run, tmp_path_factory):
    return export(run, tmp_path_factory.mktemp("export") / "a model")


@pytest.fixture(scope="session")
def pictures():
    noise = np.random.default_rng(0)
    small = (Image.fromarray(noise.integers(0, 256, (4, 4, 3), np.uint8)) for _ in range(3))
    return [image.resize((80, 60)) for image in small]
