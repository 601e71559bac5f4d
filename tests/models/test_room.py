"""A model that this machine's memory cannot hold is refused before it is built."""

import time

import pytest
from torch._subclasses.fake_tensor import FakeTensorMode

from ds_cmli import engine
from ds_cmli.common.errors import UserError
from ds_cmli.config.presets import load_preset
from ds_cmli.models.room import check_room

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
    monkeypatch.setattr("ds_cmli.models.room._free", lambda: iter([40 * 10**9]))  # 10^10 parameters in fp32
    started = time.monotonic()
    with pytest.raises(
        UserError, match=f"^{line}.*: [0-9,]+ parameters take [0-9,]+ B, and 40,000,000,000 B are free here"
    ):
        engine.build_models(load_preset("tiny", settings), 64)
    assert time.monotonic() - started < 30


def test_the_least_of_what_is_free_counts(monkeypatch):
    monkeypatch.setattr("ds_cmli.models.room._free", lambda: iter([400, 40]))
    check_room("a", 1, 10)
    with pytest.raises(UserError, match=r"^a is 1: 11 parameters take 44 B, and 40 B are free here: give a"):
        check_room("a", 1, 11)
    with FakeTensorMode():
        check_room("a", 1, 11)  # a prediction is for another machine
    monkeypatch.setattr("ds_cmli.models.room._free", lambda: iter([]))
    check_room("a", 1, 10**15)


@pytest.mark.parametrize(
    ("section", "values", "line"),
    [
        ("student", {"shared_blocks": 10**9}, "student.shared_blocks is 1000000000: give 1 to 1000"),
        ("student", {"image_overrides": {"depth": 10**9}}, "image_overrides.depth is 1000000000: give at most 1000"),
        ("student", {"text_overrides": {"num_hidden_layers": 1001}}, "num_hidden_layers is 1001: give at most 1000"),
        ("student", {"text_overrides": {"intermediate_size": 10**7}}, "is 10000000: give at most 1000000"),
        ("teacher", {"overrides": {"depths": [2, 10**9]}}, "teacher.overrides.depths is 1000000000: give at most 1000"),
        ("optim", {"micro_batch": 10**9}, "optim.micro_batch is 1000000000: give 1 to 1000000"),
        ("run", {"watchdog": 1.7e308}, r"run.watchdog is 1.7e\+308: give 0 to 1000000 \(0: off\)"),
        ("run", {"watchdog": 1e-9}, "run.watchdog is 1e-09: give 1 to 1000000 seconds"),
        ("run", {"save_minutes": 1e300}, r"run.save_minutes is 1e\+300: give 0 to 1000000000"),
        ("run", {"report_to": ["mlflow", "mlflow"]}, "has 'mlflow' twice: keep one"),
        ("optim", {"lr_factors": {"image": 1e43}}, r"optim.lr_factors.image is 1e\+43: give 1e-09 to 1000000000"),
        ("optim", {"lr_factors": {"image": 1e-43}}, "optim.lr_factors.image is 1e-43: give at least 1e-09"),
        ("optim", {"lr": 1e300}, r"optim.lr is 1e\+300: give more than 0 to 1000000000"),
        ("optim", {"eps": 1e-300}, "optim.eps is 1e-300: give 1e-30 to 1"),
        ("optim", {"weight_decay": 1e300}, "optim.weight_decay is"),
        ("optim", {"grad_clip": 1e300}, "optim.grad_clip is"),
        ("optim", {"layer_decay": 1e-300}, "optim.layer_decay is 1e-300: give 0.01 to 1"),
        ("loss", {"weights": {"cmli": 1e300}}, "loss.weights.cmli is"),
    ],
)  # fmt: skip
def test_numbers_that_are_finite_and_absurd_are_one_line(section, values, line):
    with pytest.raises(UserError, match=line):
        load_preset("tiny", {section: values})
