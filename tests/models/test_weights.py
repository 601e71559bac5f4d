"""Weights that do not fit: every key is told of; a model that the memory cannot hold is refused."""

import dataclasses
import json
import os
import time

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch._subclasses.fake_tensor import FakeTensorMode

from ds_cmli import engine
from ds_cmli.common.errors import UserError
from ds_cmli.config.presets import load_preset
from ds_cmli.models.student import Student
from ds_cmli.models.teacher import Teacher
from ds_cmli.models.weights import check_room

CONFIG = load_preset("tiny", {})
S, VOCAB, GRID = CONFIG.data.image_size, 99, (4, 4)
EVERY = ("image", "text", "teacher")


@pytest.fixture(scope="module")
def state():
    """The whole state dict of each encoder, by the name of its tower."""
    torch.manual_seed(1)
    student = Student(CONFIG.student, S, VOCAB)
    vit = timm.create_model(CONFIG.student.image_model, num_classes=0, img_size=S, **CONFIG.student.image_overrides)
    text = {key: value.clone() for key, value in student.text.model.state_dict().items()}
    return {"image": vit.state_dict(), "teacher": vit.state_dict(), "text": text, "config": student.text.model.config}


@pytest.fixture
def load(tmp_path, state):
    """`load(tower, weights)` -> the encoder, its weights read from a file or folder that holds `weights`."""

    def load(tower, weights, pickle=False, fields=(), config=CONFIG, **settings):
        folder = tmp_path / "weights"
        folder.mkdir(exist_ok=True)
        path = folder / ("pytorch_model.bin" if pickle else "model.safetensors")
        if pickle:
            torch.save(weights, path)
        else:
            save_file({k: v.clone() for k, v in weights.items()}, path, metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps({**state["config"].to_dict(), **dict(fields)}))
        if tower == "teacher":
            return Teacher(dataclasses.replace(config.teacher, weights=str(path), **settings), S, GRID).image.model
        where = {"image": {"image_weights": str(path)}, "text": {"text_weights": str(folder)}}[tower]
        student = Student(dataclasses.replace(config.student, **where, **settings), S, VOCAB)
        return student.image.model if tower == "image" else student.text.model

    return load


def block(tower, number):
    return f"layer.{number}." if tower == "text" else f"blocks.{number}."


def without(weights, part):
    return {key: value for key, value in weights.items() if part not in key}


@pytest.mark.parametrize("pickle", [False, True])
@pytest.mark.parametrize("tower", EVERY)
def test_whole_weights_arrive(tower, pickle, state, load):
    encoder = load(tower, state[tower], pickle)
    for key, value in encoder.state_dict().items():
        assert torch.equal(value, state[tower][key]), key


@pytest.mark.parametrize("partial", [False, True])
@pytest.mark.parametrize("tower", EVERY)
def test_keys_none_of_which_fits_are_refused(tower, partial, state, load):
    prefixed = {f"backbone.x.{key}": value for key, value in state[tower].items()}
    with pytest.raises(
        UserError, match=r"none of its keys \(backbone.x.*: remove 'backbone.x.' from its keys$"
    ) as error:
        load(tower, prefixed, weights_partial=partial)
    assert str(error.value).startswith("teacher.weights" if tower == "teacher" else f"student.{tower}_weights")
    key = next(iter(load(tower, state[tower]).state_dict()))
    with pytest.raises(
        UserError, match=rf"\(a, b\) is one of the model's \({key}, .*: give weights in the layout of"
    ) as error:
        load(tower, {"a": torch.ones(1), "b": torch.ones(2)}, weights_partial=partial)
    assert "weights_partial" not in str(error.value)


@pytest.mark.parametrize("key", [
    "embeddings.patch_embeddings.projection.weight", "vision_model.embeddings.patch_embedding.weight",
    "vit.embeddings.patch_embeddings.projection.bias", "resnet.embedder.embedder.convolution.weight",
])  # fmt: skip
def test_weights_in_the_layout_of_transformers_are_told(key, load):
    for tower in ("image", "teacher"):
        with pytest.raises(UserError, match=r"none of its keys .*: they are transformers' names: give the weights"):
            load(tower, {key: torch.ones(1), "encoder.layer.0.attention.attention.query.weight": torch.ones(2)})


@pytest.mark.parametrize("tower", EVERY)
def test_weights_without_any_block_are_not_proposed_to_be_completed(tower, state, load):
    table = {key: value for key, value in state[tower].items() if value.ndim == 1 or "embed" in key}
    with pytest.raises(UserError, match=r"lacks weights of block 0, 1 \(.*: give weights that have them$"):
        load(tower, table)


@pytest.mark.parametrize("tower", EVERY)
def test_a_missing_block_is_refused_unless_allowed(tower, state, load, capsys):
    part = block(tower, 1)
    lacking = without(state[tower], part)
    with pytest.raises(UserError, match=r"lacks weights of block 1 .* keys missing.*weights_partial=true"):
        load(tower, lacking)
    with pytest.raises(UserError, match="lacks weights of block 1"):  # its biases alone do not make a block
        load(tower, {k: v for k, v in state[tower].items() if part not in k or v.ndim == 1})
    capsys.readouterr()
    encoder = load(tower, lacking, weights_partial=True)
    assert f"{len(state[tower]) - len(lacking)} of " in capsys.readouterr().out
    key = next(key for key in encoder.state_dict() if block(tower, 0) in key)
    assert torch.equal(encoder.state_dict()[key], state[tower][key])


@pytest.mark.parametrize("tower", ["image", "text"])
def test_a_missing_block_that_is_cut_off_is_none(tower, state, load):
    load(tower, without(state[tower], block(tower, 1)), layers=1)


def test_a_text_model_of_fewer_layers_is_refused(state, load):
    image = {**CONFIG.student.image_overrides, "depth": 3}
    settings = {"layers": 3, "image_overrides": image, "text_overrides": {}}
    with pytest.raises(UserError, match=r"student.text_weights .* lacks weights of block 2 \(16 of 53 keys missing"):
        load("text", state["text"], **settings)
    load("text", state["text"], **settings, weights_partial=True)


@pytest.mark.parametrize("tower", EVERY)
def test_single_keys_are_told_in_one_line_a_kind(tower, state, load, capsys):
    lost = "embeddings.LayerNorm.bias" if tower == "text" else "cls_token"
    load(tower, {**without(state[tower], lost), "foreign": torch.ones(1)})
    lines = capsys.readouterr().out.splitlines()
    assert len([line for line in lines if "1 of" in line and line.endswith(f"random at the start: {lost}")]) == 1
    assert len([line for line in lines if "there not used: foreign" in line]) == 1


@pytest.mark.parametrize("tower", ["image", "teacher"])
def test_resized_positions_are_told(tower, state, load, capsys):
    load(tower, {**state[tower], "pos_embed": torch.randn(1, 65, 32)})
    assert "1 of 30 keys resized: pos_embed [1, 65, 32] -> [1, 17, 32]" in capsys.readouterr().out


@pytest.mark.parametrize("partial", [False, True])
def test_other_shapes_are_refused(partial, state, load):
    wrong = {**state["text"], "embeddings.LayerNorm.weight": torch.ones(31)}
    with pytest.raises(
        UserError, match=r"1 of 37 keys of another shape: embeddings.LayerNorm.weight \[31\] for \[32\]"
    ):
        load("text", wrong, weights_partial=partial)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("tower", "key"),
    [
        ("image", "blocks.0.attn.qkv.weight"),
        ("image", "norm.weight"),  # loaded, though cut off
        ("teacher", "blocks.1.mlp.fc1.bias"),
        ("text", "embeddings.word_embeddings.weight"),
    ],
)
def test_values_that_are_not_finite_are_refused(tower, key, value, state, load):
    bad = state[tower][key].clone()
    bad.view(-1)[-1] = value  # of the embeddings, a row that no caption uses
    with pytest.raises(UserError, match=f"weights is '.*': its '{key}' holds NaN or infinite values"):
        load(tower, {**state[tower], key: bad})


class Code:
    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


@pytest.mark.parametrize("tower", EVERY)
def test_code_in_a_pickle_is_refused_and_never_advised(tower, tmp_path, state, load):
    with pytest.raises(UserError, match=r"holds more than tensors \(posix.mkdir\).*give a .safetensors file") as error:
        load(tower, {**state[tower], "code": Code(tmp_path / "ran")}, pickle=True)
    assert "weights_only" not in str(error.value)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", [b"", b"hello", b"\x80\x02."])
@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
def test_what_is_no_file_of_weights_is_one_line(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=r"cannot build it: .{10,}"):
        Teacher(dataclasses.replace(CONFIG.teacher, weights=str(tmp_path / name)), S, GRID)


@pytest.mark.parametrize("content", [{}, {"teacher": {"cls_token": torch.ones(1)}}, [torch.ones(1)], {"step": 3}])
def test_pickles_without_tensors_by_name_are_one_line(content, load):
    with pytest.raises(UserError, match="tensors by name"):
        load("image", content, pickle=True)


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
        with pytest.raises(UserError, match="never run: choose a model that the transformers library has") as error:
            load("text", state["text"], fields=fields)
        assert "trust_remote_code" not in str(error.value)
    assert not (tmp_path / "ran").exists()


def test_libraries_print_nothing(state, load, capfd):
    load("text", {**state["text"], "foreign": torch.ones(1)})
    assert "LOAD REPORT" not in "".join(capfd.readouterr())


def test_a_hub_out_of_reach_is_one_line_at_once(monkeypatch):
    from huggingface_hub import constants

    from ds_cmli.common import pretrained

    results = []
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", "/nonexistent")
    monkeypatch.setattr(pretrained, "_answers", lambda url: results.append(url))
    for settings in ({"image_weights": "hub"}, {"text_model": "bert-base-uncased", "text_weights": "hub"}):
        with pytest.raises(UserError, match=r"weights is 'hub'.*hub cannot be reached"):
            Student(dataclasses.replace(CONFIG.student, **settings), S, VOCAB)
    assert len(results) == 2


VIT = {"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 14}
BERT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"student": {"image_overrides": {**VIT, "embed_dim": 10**5}}}, "student.image_model is 'vit_tiny_patch16"),
        ({"teacher": {"overrides": {**VIT, "embed_dim": 10**5}}}, "teacher.model is 'vit_tiny_patch16"),
        (
            {"student": {"text_overrides": {**BERT, "hidden_size": 10**5, "intermediate_size": 10**6}}},
            "student.text_model is 'bert'",
        ),
        (
            {"student": {"image_overrides": {**VIT, "embed_dim": 1024}, "shared_blocks": 1000}},
            "student.shared_blocks is 1000",
        ),
    ],
)  # fmt: skip
def test_a_model_beyond_the_memory_is_one_line(settings, line, monkeypatch):
    monkeypatch.setattr("ds_cmli.models.weights._free", lambda: iter([40 * 10**9]))  # 10^10 parameters in fp32
    started = time.monotonic()
    with pytest.raises(
        UserError, match=f"^{line}.*: [0-9,]+ parameters take [0-9,]+ B, and 40,000,000,000 B are free here"
    ):
        engine.build_models(load_preset("tiny", settings), 64)
    assert time.monotonic() - started < 30


def test_the_least_of_what_is_free_counts(monkeypatch):
    monkeypatch.setattr("ds_cmli.models.weights._free", lambda: iter([400, 40]))
    check_room("a", 1, 10)
    with pytest.raises(UserError, match=r"^a is 1: 11 parameters take 44 B, and 40 B are free here: give a"):
        check_room("a", 1, 11)
    with FakeTensorMode():
        check_room("a", 1, 11)  # a prediction is for another machine
    monkeypatch.setattr("ds_cmli.models.weights._free", lambda: iter([]))
    check_room("a", 1, 10**15)


@pytest.mark.parametrize(
    ("section", "values", "line"),
    [
        ("student", {"shared_blocks": 10**9}, "student.shared_blocks is 1000000000: Input should be .* 1000"),
        ("student", {"image_overrides": {"depth": 10**9}}, "image_overrides.depth is 1000000000: give at most 1000"),
        ("student", {"text_overrides": {"num_hidden_layers": 1001}}, "num_hidden_layers is 1001: give at most 1000"),
        ("student", {"text_overrides": {"intermediate_size": 10**7}}, "is 10000000: give at most 1000000"),
        ("teacher", {"overrides": {"depths": [2, 10**9]}}, "teacher.overrides.depths is 1000000000: give at most 1000"),
        ("optim", {"micro_batch": 10**9}, "optim.micro_batch is 1000000000: Input should be .* 1000000"),
        ("run", {"watchdog": 1.7e308}, r"run.watchdog is 1.7e\+308: Input should be .* 1000000 \(0: off\)"),
        ("run", {"watchdog": 1e-9}, "run.watchdog is 1e-09: give 1 to 1000000 seconds"),
        ("run", {"save_minutes": 1e300}, r"run.save_minutes is 1e\+300: Input should be .* 1000000000"),
        ("optim", {"lr_factors": {"image": 1e43}}, r"lr_factors is {'image': 1e\+43}: Input should be .* 1000000000"),
        ("optim", {"lr_factors": {"image": 1e-43}}, "optim.lr_factors is {'image': 1e-43}: Input should be greater"),
        ("optim", {"lr": 1e300}, r"optim.lr is 1e\+300: Input should be .* 1000000000"),
        ("optim", {"eps": 1e-300}, "optim.eps is 1e-300: Input should be greater than or equal to "),
        ("optim", {"weight_decay": 1e300}, "optim.weight_decay is"),
        ("optim", {"grad_clip": 1e300}, "optim.grad_clip is"),
        ("optim", {"layer_decay": 1e-300}, "optim.layer_decay is 1e-300: Input should be greater"),
        ("loss", {"weights": {"cmli": 1e300}}, "loss.weights is {'cmli': 1e.300}: "),
    ],
)  # fmt: skip
def test_numbers_that_are_finite_and_absurd_are_one_line(section, values, line):
    with pytest.raises(UserError, match=line):
        load_preset("tiny", {section: values})
