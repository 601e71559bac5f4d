"""A run's folder is a model of transformers: the weights that were trained, their features, and their scores."""

import io
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModel, AutoProcessor

from ds_cmli.checkpoint.weights import write_weights
from ds_cmli.data.images import View
from ds_cmli.data.tokens import builtin_tokenizer
from ds_cmli.errors import UserError
from ds_cmli.models import hf
from tests import make
from tests.make import BERT, T5, VIT, save_run

TEXTS = ["a red car", "two dogs,sitting under a tree", "x"]
PIXELS = np.random.default_rng(0).integers(0, 256, (80, 60, 3), np.uint8)


def trained(losses=("global", "cmli"), **sections):
    """Return a run's parts as `make.untrained` does, with weights as after a training."""
    config, objective, words = make.untrained(losses, **sections)
    for parameter in objective.student.shared.parameters():  # which start as the identity
        torch.nn.init.normal_(parameter, std=0.2)
    return config, objective.eval(), words


SWIN = {"embed_dim": 16, "depths": [1, 1], "num_heads": [1, 2]}
KINDS = {
    "vit, bert": ({}, ("global", "cmli")),
    "rotary positions, bert": ({"image_model": "eva02_tiny_patch14_224", "image_overrides": VIT}, ("cmli",)),
    "batch norm, a causal text": (
        {"image_model": "resnet18", "image_overrides": {"layers": [1, 1, 1, 1]}, "text_model": "clip",
         "text_overrides": BERT},
        ("cmli_sigmoid", "global_sigmoid"),
    ),
    "windows, a tied table": (
        {"image_model": "swin_tiny_patch4_window7_224", "image_overrides": SWIN, "text_model": "t5",
         "text_overrides": T5},
        ("global",),
    ),
    "a table of more rows than tokens": ({"text_overrides": {**BERT, "vocab_size": 2000}}, ("cmli",)),
    "a distillation": ({}, ("cls_kd",)),
}  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_what_was_trained_is_loaded_to_the_bit(kind, tmp_path):
    student, losses = KINDS[kind]
    config, objective, words = trained(losses, student=student, data={"image_size": 64} if "batch norm" in kind else {})
    run = save_run(tmp_path / "run", config, objective, words)
    model = AutoModel.from_pretrained(run)
    saved = load_file(run / hf.WEIGHTS)
    loaded = model.state_dict(keep_vars=True)
    assert saved.keys() <= loaded.keys() and len({x.data_ptr() for x in loaded.values() if x.numel()}) <= len(saved)
    assert all(torch.equal(value, loaded[name]) for name, value in saved.items())
    assert json.loads((run / "config.json").read_text())["dtype"] == "float32"  # whatever an engine has
    for (name, buffer), (_, own) in zip(model.student.named_buffers(), objective.student.named_buffers(), strict=True):
        assert torch.equal(buffer, own), name
    inputs = AutoProcessor.from_pretrained(run)(images=[PIXELS] * 3, text=TEXTS)
    pixels = inputs.pop("pixel_values")
    pairs = [
        (model.get_image_features(pixels), objective.student.encode_image(pixels)),
        (model.get_text_features(**inputs), objective.student.encode_text(**inputs)),
    ]
    for features, (cls, tokens) in pairs:
        torch.testing.assert_close(features.pooler_output, cls, rtol=0, atol=1e-6)
        projected = objective.student.projection(tokens)
        torch.testing.assert_close(features.last_hidden_state, projected, rtol=0, atol=1e-6)
    if kind != "a distillation":
        assert model.scales() == objective.scales()


@pytest.fixture(scope="module")
def made():
    return trained()


@pytest.fixture(scope="module")
def run(made, tmp_path_factory):
    return save_run(tmp_path_factory.mktemp("run"), *made)


@torch.no_grad()
def test_in_16_bits_temperatures_stay_and_it_saves_itself(run, tmp_path):
    model = AutoModel.from_pretrained(run)
    half = AutoModel.from_pretrained(run, dtype=torch.bfloat16)
    assert half.scales() == model.scales() and half.student.projection.weight.dtype == torch.bfloat16
    pixels = AutoProcessor.from_pretrained(run)(images=PIXELS)["pixel_values"]
    wanted = model.get_image_features(pixels).pooler_output
    torch.testing.assert_close(half.get_image_features(pixels).pooler_output.float(), wanted, atol=0.1, rtol=0.1)
    model.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path).get_image_features(pixels).pooler_output
    torch.testing.assert_close(again, wanted, rtol=0, atol=1e-6)


def test_the_processor_prepares_as_training_does(made, run):
    config, _, words = made
    processor = AutoProcessor.from_pretrained(run)
    image = Image.fromarray(PIXELS)
    tensor = torch.from_numpy(PIXELS).permute(2, 0, 1)
    image.save(file := io.BytesIO(), "PNG")
    wanted = View.of(config.data)(PIXELS)
    for picture in (PIXELS, image, tensor, [PIXELS], (image,), PIXELS[None], tensor[None], file.getvalue()):
        assert torch.equal(processor(images=picture)["pixel_values"], wanted[None])
    inputs = processor(text=TEXTS, padding=True, truncation=True, return_tensors="pt")
    assert [row[mask].tolist() for row, mask in zip(*inputs.values(), strict=True)] == [
        words(text).input_ids for text in TEXTS
    ]
    token_mask = AutoModel.from_pretrained(run).token_mask(**inputs)
    assert [int(row.sum()) for row in token_mask] == [sum(words(text).valid) for text in TEXTS]
    long = processor(text="a red car " * 100)["input_ids"]
    assert long.shape == (1, words.positions) and long[0].tolist() == words("a red car " * 100).input_ids
    arrays = processor(images=PIXELS, text="a", return_tensors="np")
    assert all(isinstance(value, np.ndarray) for value in arrays.values())
    with pytest.raises(ValueError, match="padded and cut off as in training"):
        processor(text=TEXTS, padding="max_length")


def test_an_end_that_is_also_the_padding_is_attended_to(tmp_path):
    whole = builtin_tokenizer()
    whole.pad_token = "[SEP]"
    whole.save_pretrained(tmp_path / "words")
    run = save_run(tmp_path / "run", *trained(data={"tokenizer": str(tmp_path / "words")}))
    ids, mask = AutoProcessor.from_pretrained(run)(text="a red car").values()
    assert ids[mask][-1] == whole.pad_token_id and mask.sum() == 5


def test_what_is_not_there_or_damaged_is_one_line(run, tmp_path):
    with pytest.raises(UserError, match=r"^the model is '[^\n]*: no config\.json there; give a run"):
        hf.load_model(tmp_path, setting="the model")
    damaged = shutil.copytree(run, tmp_path / "damaged")
    weights = load_file(run / hf.WEIGHTS)
    name = "student.projection.weight"
    projection = weights.pop(name)
    for change, line in (({}, "does not fit"), ({name: projection[1:]}, "cannot be loaded|does not fit")):
        write_weights(weights | change, damaged / hf.WEIGHTS)
        with pytest.raises(UserError, match=f"^[^\n]*({line})[^\n]*$"):
            hf.load_model(damaged)
    (damaged / hf.WEIGHTS).write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"^[^\n]*cannot be loaded[^\n]*$"):
        hf.load_model(damaged)
