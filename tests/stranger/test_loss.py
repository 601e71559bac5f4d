"""A loss is one file and one entry of a plugin: it trains, is evaluated, exported, and its memory is predicted."""

import json

import pytest

from ds_cmli.inference import Model
from tests.stranger.drive import STEPS, drive

PLUGIN = ("--plugin", "tests.stranger.toy_plugin")
pytestmark = pytest.mark.usefixtures("alone", "plugins")


def test_one_over_pairs_beside_one_over_each_pair(tmp_path):
    run_content = drive(tmp_path, *PLUGIN, "--losses", "filip,grouping=0.5", "--set", "optim.negatives=global_batch")
    assert len(run_content["logged"]) == STEPS and "refused" not in run_content
    for line in run_content["logged"]:
        assert line["loss"] == pytest.approx(line["loss/filip"] + 0.5 * line["loss/grouping"], rel=1e-5)
        assert {"temperature/filip", "temperature/grouping"} <= line.keys()
    assert {"eval/seen/combined/i2t_r1", "eval/seen/cmli/i2t_r1"} <= run_content["evaluated"].keys()
    for folder in ("run", "exported"):
        assert json.loads((tmp_path / folder / "config.json").read_text())["plugins"] == [PLUGIN[1]]
    assert f"\nimport {PLUGIN[1]}  # a plugin" in (tmp_path / "exported" / "modeling_ds_cmli.py").read_text()


def test_without_pairs_there_is_a_result_and_no_export(tmp_path):
    run_content = drive(tmp_path, *PLUGIN, "--losses", "grouping", "--set", "run.match_maps=0")
    assert len(run_content["logged"]) == STEPS and "eval/seen/global/i2t_r1" in run_content["evaluated"]
    assert "compare no pairs: it has no scores to export" in run_content["refused"]
    assert Model.load(tmp_path / "run", "cpu").scales == {}
