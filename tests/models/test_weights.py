"""Weights of files and folders: they arrive whole, or are refused in one line, and none runs code."""

import dataclasses
import json
import time

import pytest
import timm
import torch
from huggingface_hub import constants
from safetensors.torch import save_file

from ds_cmli.config.presets import load_preset
from ds_cmli.errors import UserError
from ds_cmli.models.student import Student, Teacher
from tests.checkpoint.runs import Code
from tests.make import T5

CONFIG = load_preset("tiny", {})
S = CONFIG.data.image_size
VOCAB = 99
EVERY = ("image", "text", "teacher")
VIT = {"num_classes": 0, **CONFIG.student.image_overrides}  # of a file without a classifier


@pytest.fixture(scope="module")
def state():
    """The whole state dict of each encoder, by the name of its tower."""
    torch.manual_seed(1)
    student = Student(CONFIG.student, S, VOCAB)
    vit = timm.create_model(CONFIG.student.image_model, img_size=S, **VIT)
    text = {key: value.clone() for key, value in student.text.model.state_dict().items()}
    return {"image": vit.state_dict(), "teacher": vit.state_dict(), "text": text, "config": student.text.model.config}


@pytest.fixture
def load(tmp_path, state):
    """`load(tower, weights)` -> the encoder, its weights read from a file or folder that holds `weights`."""

    def load(tower, weights, pickle=False, fields=(), **settings):
        folder = tmp_path / "weights"
        folder.mkdir(exist_ok=True)
        path = folder / ("pytorch_model.bin" if pickle else "model.safetensors")
        if pickle:
            torch.save(weights, path)
        else:
            save_file({k: v.clone() for k, v in weights.items()}, path, metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps({**state["config"].to_dict(), **dict(fields)}))
        if tower == "teacher":
            settings = {"weights": str(path), "overrides": VIT, **settings}
            return Teacher(dataclasses.replace(CONFIG.teacher, **settings), S, (4, 4)).image.model
        if tower == "image":
            settings = {"image_weights": str(path), "image_overrides": VIT, **settings}
        else:
            settings = {"text_weights": str(folder)}
        student = Student(dataclasses.replace(CONFIG.student, **settings), S, VOCAB)
        return student.image.model if tower == "image" else student.text.model

    return load


@pytest.mark.parametrize("pickle", [False, True])
@pytest.mark.parametrize("tower", EVERY)
def test_whole_weights_arrive(tower, pickle, state, load):
    encoder = load(tower, state[tower], pickle)
    for key, value in encoder.state_dict().items():
        assert torch.equal(value, state[tower][key]), key
    assert tower != "text" or encoder.training  # which `from_pretrained` leaves in eval mode


def test_an_images_classifier_is_cut_off(state, load):
    head = {"head.weight": torch.ones(1000, 32), "head.bias": torch.ones(1000)}
    encoder = load("image", state["image"] | head, image_overrides=CONFIG.student.image_overrides)
    assert torch.equal(encoder.cls_token, state["image"]["cls_token"]) and "head.weight" not in encoder.state_dict()


def test_a_file_of_a_text_model_needs_no_folder_and_tied_tables_arrive(tmp_path):
    """T5's table of tokens has two names, and a file has it once."""
    config = dataclasses.replace(CONFIG.student, text_model="t5", text_overrides=T5)
    saved = Student(config, S, VOCAB).text.model
    saved.save_pretrained(tmp_path)
    folder = {"text_weights": str(tmp_path), "text_overrides": {}}
    for weights in (folder, {"text_weights": str(tmp_path / "model.safetensors")}):
        loaded = Student(dataclasses.replace(config, **weights), S, VOCAB).text.model
        assert torch.equal(loaded.shared.weight, saved.shared.weight)
        assert loaded.encoder.embed_tokens.weight is loaded.shared.weight


@pytest.mark.parametrize("tower", EVERY)
def test_weights_that_do_not_fit_are_one_line(tower, state, load):
    """A missing one, one of another shape, others' names: where a library fills in random ones, it would be silent."""
    norm = "embeddings.LayerNorm.weight" if tower == "text" else "blocks.1.norm1.weight"
    settings = "student.text_model" if tower == "text" else "teacher.model|student.image_model"
    for weights in (
        {key: value for key, value in state[tower].items() if norm not in key},
        {**state[tower], norm: torch.ones(31)},
        {f"backbone.x.{key}": value for key, value in state[tower].items()},
    ):
        with pytest.raises(UserError, match=rf"^({settings}) is [^\n]*$"):
            load(tower, weights)


@pytest.mark.parametrize("tower", EVERY)
def test_code_in_a_pickle_is_refused_and_never_advised(tower, tmp_path, state, load):
    with pytest.raises(UserError, match=r"holds more than tensors, .* never run: give .safetensors") as error:
        load(tower, {**state[tower], "code": Code(tmp_path / "ran")}, pickle=True)
    assert "weights_only" not in str(error.value)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("kind", ["bert", "unheard-of"])
def test_code_of_a_model_folder_is_never_run(kind, tmp_path, state, load, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question was asked"))
    folder = tmp_path / "weights"
    folder.mkdir()
    (folder / "code.py").write_text(f"import os; os.mkdir({str(tmp_path / 'ran')!r})")
    fields = {"model_type": kind, "auto_map": {"AutoConfig": "code.Config", "AutoModel": "code.Model"}}
    if kind == "bert":
        load("text", state["text"], fields=fields)
    else:
        with pytest.raises(UserError, match=r"custom code|trust_remote_code"):
            load("text", state["text"], fields=fields)
    assert not (tmp_path / "ran").exists()


def test_a_hub_out_of_reach_is_one_line_at_once(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", "/nonexistent")
    start = time.monotonic()
    for settings in ({"image_weights": "hub"}, {"text_model": "bert-base-uncased", "text_weights": "hub"}):
        with pytest.raises(UserError, match=r"its weights 'hub'.*(LocalEntryNotFoundError|couldn't connect)"):
            Student(dataclasses.replace(CONFIG.student, **settings), S, VOCAB)
    assert time.monotonic() - start < 30  # the library tries again and again, for a minute
