"""Hints that know the whole configuration: what they propose is taken."""

import re

import pytest

from ds_cmli import engine
from ds_cmli.common.errors import UserError
from ds_cmli.config.presets import load_preset

SIXTEEN = {"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 16}
EIGHT_BY_FOUR = {"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 24}


def refused(**settings) -> str:
    with pytest.raises(UserError) as error:
        engine.build_models(load_preset("tiny", settings), 64)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("size", "student", "teacher", "fits"),
    [
        (96, SIXTEEN, None, 112), (15, SIXTEEN, None, 112), (4095, SIXTEEN, None, 4032),
        (60, None, EIGHT_BY_FOUR, 168), (57, None, None, 56),
    ],
)  # fmt: skip
def test_a_proposed_image_size_fits_student_and_teacher(size, student, teacher, fits):
    models = {name: {key: value} for name, key, value in (("student", "image_overrides", student),
                                                          ("teacher", "overrides", teacher)) if value}  # fmt: skip
    line = refused(data={"image_size": size}, **models)
    assert line.endswith(f"give for instance {fits}, which fits student.image_model and teacher.model")
    if fits < 200:
        engine.build_models(load_preset("tiny", {"data": {"image_size": fits}, **models}), 64)


def test_a_proposed_image_size_for_a_feature_map_and_without_a_teacher():
    resnet = {"image_model": "resnet10t", "image_overrides": {}}
    assert "give for instance 224, which fits" in refused(student=resnet)
    assert refused(student=resnet, loss={"weights": {"cmli": 1}}).endswith("; give for instance 64")


def test_patches_that_no_size_fits():
    student, teacher = {"image_overrides": {**SIXTEEN, "patch_size": 61}}, {"overrides": {**SIXTEEN, "patch_size": 97}}
    line = refused(data={"image_size": 62}, student=student, teacher=teacher)
    assert line.endswith("no size fits patches of 61 and 97 pixels: choose other models")


@pytest.mark.parametrize(
    ("section", "model", "name", "sizes"),
    [("teacher", "model", "resnet10t", "overrides"), ("student", "text_model", "gpt2", "text_overrides")],
)
def test_sizes_that_the_preset_has_set_are_not_blamed_on_the_user(section, model, name, sizes):
    line = refused(**{section: {model: name}})
    assert re.search(
        rf"; the preset 'tiny' sets {section}.{sizes} for '\w+': give --set {section}.{sizes}={{}} too", line
    )
    assert "preset" not in refused(**{section: {model: name, sizes: {"typo": 1}}})
