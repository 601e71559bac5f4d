"""A loss and an encoder of a plugin: trained, evaluated, exported, their memory predicted; and one that is missing."""

import importlib

import pytest
from click.testing import CliRunner

from ds_cmli.common.errors import UserError
from ds_cmli.train import command
from tests import make
from tests.stranger.drive import STEPS, drive

PLUGIN = ("--plugin", "tests.stranger.toy")
pytestmark = pytest.mark.usefixtures("alone", "plugins")


def test_a_loss_beside_another(tmp_path):
    run_content = drive(tmp_path, *PLUGIN, "--losses", "filip,global=0.5")
    assert len(run_content["logged"]) == STEPS and "refused" not in run_content
    for line in run_content["logged"]:
        assert line["loss"] == pytest.approx(line["loss/filip"] + 0.5 * line["loss/global"], rel=1e-5)
        assert "temperature/filip" in line
    assert {"eval/seen/combined/i2t_r1", "eval/seen/cmli/i2t_r1"} <= run_content["evaluated"].keys()


def test_an_image_encoder(tmp_path):
    model = ("--set", "student.image_model=mixers", "--set", "student.image_weights=random")
    run_content = drive(tmp_path, *PLUGIN, *model, "--image-backbone", "mixers", "--losses", "global,cmli")
    assert len(run_content["logged"]) == STEPS and "refused" not in run_content
    assert "eval/seen/combined/i2t_r1" in run_content["evaluated"]


def test_a_typo_builds_none_of_its_encoders():
    importlib.import_module("tests.stranger.toy")
    with pytest.raises(UserError, match=r"student.image_model is 'vit_tinny', .*Unknown model"):
        make.models(student={"image_model": "vit_tinny"})


def test_one_that_is_missing_is_one_line():
    done = CliRunner().invoke(command, ["--plugin", "nowhere.at_all"])
    assert isinstance(done.exception, UserError)
    assert str(done.exception) == "--plugin is 'nowhere.at_all': No module named 'nowhere'"
