"""A backbone is one file and one entry: it trains, is evaluated, exported, and its memory is predicted."""

from ds_cmli.config.registry import IMAGE, BackboneEntry
from tests.stranger.drive import STEPS, drive


def test_an_image_encoder(tmp_path, monkeypatch, alone):
    monkeypatch.setitem(IMAGE, "mixers", BackboneEntry("tests.stranger.toy_backbone:Mixers", "a toy"))
    model = ("--set", "student.image_model=mixers", "--set", "student.image_weights=random")
    run_content = drive(tmp_path, *model, "--image-backbone", "mixers", "--losses", "global,cmli")
    assert len(run_content["logged"]) == STEPS and "refused" not in run_content
    assert "eval/seen/combined/i2t_r1" in run_content["evaluated"]
