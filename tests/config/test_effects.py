"""A setting that has no effect beside the others is told, however it was given."""

import dataclasses

import pytest

from ds_cmli import engine
from ds_cmli.config.deepspeed_config import DeepSpeedConfig
from ds_cmli.config.effects import reasons
from ds_cmli.config.options import how_given, print_without_effect, resolve_config
from ds_cmli.config.presets import load_preset
from ds_cmli.config.schema import Config
from tests.config.given import options
from tests.conftest import ZERO1

ACCUMULATION = {"gradient_accumulation_steps": 2}
SGD = {"optimizer": {"type": "SGD"}, "zero_allow_untested_optimizer": True}


@pytest.mark.parametrize(
    ("settings", "given", "json", "ranks", "line"),
    [
        ("data.max_pixels=100", {}, {}, 1, "--set data.max_pixels has no effect: the demo makes its own pictures"),
        ("data.prefetch=3", {}, {}, 1, "there is no loading process"),
        ("data.prefetch=3", {"workers": 1}, {}, 1, None),
        ("student.weights_partial=true", {}, {}, 1, "both encoders' weights are random"),
        ("student.weights_partial=true student.text_weights=hub", {}, {}, 1, None),
        ("teacher.weights_partial=true", {}, {}, 1, "teacher.weights is 'random'"),
        ("run.match_maps=2", {}, {}, 1, None),
        ("run.patience=4", {"eval_every": 5}, {}, 1, "run.patience has no effect: it is 4, and the run has 4 evaluat"),
        ("run.patience=3", {"eval_every": 5}, {}, 1, None),
        ("", {"log_every": 21}, {}, 1, "--log-every has no effect: it is 21, and the run has 20 steps"),
        ("", {"save_every": 30, "steps": 29}, {}, 1, "--save-every has no effect: it is 30, and the run has 29 steps"),
        ("", {"eval_every": 20}, {}, 1, None),
        ("optim.negatives=micro_batch", {}, {}, 1, "optim.negatives has no effect: a step is one micro-batch"),
        ("optim.negatives=micro_batch", {}, ACCUMULATION, 1, None),
        ("optim.negatives=micro_batch", {"losses": "cls_kd"}, ACCUMULATION, 1, "which compare no pairs"),
        ("optim.reduce_once=true", {}, ACCUMULATION, 2, "optim.reduce_once has no effect: ZeRO stage 1 reduces once"),
        ("optim.reduce_once=true", {}, {**ACCUMULATION, "zero_optimization": {"stage": 2}}, 2, None),
        ("optim.betas=[0.8,0.9]", {}, SGD, 1, "optim.betas has no effect: the optimizer S"),
        ("optim.weight_decay=0.1", {}, SGD, 1, None),
    ],
)  # fmt: skip
def test_settings_beside_others(settings, given, json, ranks, line, capsys):
    settings, given = tuple(settings.split()), options(**given)
    config = resolve_config(settings, given)
    print_without_effect(config, DeepSpeedConfig.of(ZERO1 | json), ranks, how_given(settings, given))
    said = capsys.readouterr().out.splitlines()
    assert said == [] if line is None else [line in text for text in said] == [True], said


def test_reasons_are_of_settings_that_exist():
    known = {
        f"{section.name}.{field.name}"
        for section in dataclasses.fields(Config)
        for field in dataclasses.fields(section.default_factory)
    }
    ours = {"run": {"log_every": 999, "eval_every": 999, "save_every": 999, "patience": 9}}
    result: set[str] = set()
    for preset, ranks, steps in (("tiny", 1, 1), ("tiny", 1, 2), ("demo", 2, 2), ("paper", 2, 1)):
        for more in ({}, SGD):
            ds_config = DeepSpeedConfig.of({**ZERO1, **more, "gradient_accumulation_steps": steps})
            result |= reasons(load_preset(preset, ours), ds_config, ranks).keys()
    assert len(result) > 15 and result <= known


def test_a_setting_is_named_as_it_was_given():
    given = how_given(("data.context_length=8", "optim.lr=1"), options(keep=3, preset="tiny"))
    assert given == {
        "data.context_length": "--set data.context_length", "optim.lr": "--set optim.lr", "run.keep": "--keep",
        "run.preset": "--preset",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("student", "optim", "lines"),
    [
        (
            {"freeze_image": 2}, {"lr_factors": {"image": 0.5, "text": 0.5}},
            ["optim.lr_factors image has no effect: the whole image encoder is frozen (student.freeze_image)"],
        ),
        ({"freeze_image": 1}, {"lr_factors": {"image": 0.5}}, []),
        (
            {"freeze_image": 2, "freeze_text": 2}, {"layer_decay": 0.5},
            ["optim.layer_decay has no effect: both encoders are frozen whole"],
        ),
    ],
)  # fmt: skip
def test_rates_of_a_frozen_encoder(student, optim, lines, capsys):
    engine.build_models(load_preset("tiny", {"student": student, "optim": optim, "loss": {"weights": {"cmli": 1}}}), 64)
    printed = capsys.readouterr().out.splitlines()
    assert [line for line in printed if not line.startswith("warning: ")] == lines  # of its random matrices
