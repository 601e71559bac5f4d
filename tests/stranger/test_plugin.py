"""A loss and an encoder of a plugin: trained, evaluated, exported, their memory predicted; and one that is missing."""

import pytest

from ds_cmli.config.schema import load_config
from tests import make
from tests.stranger.drive import check_memory, used

BF16 = {"zero_optimization": {"stage": 2}, "bf16": {"enabled": True}}


def test_a_plugins_loss_and_encoder(tmp_path, source, plugins):
    run = tmp_path / "run"
    model = {
        "student.image_backbone": "mixers",
        "student.image_model": "mixers",
        "student.image_weights": "random",
        "student.layers": 1,
    }
    options = {
        "--plugin": "tests.stranger.toy",
        "--losses": "filip,global=0.5",
        "--output-dir": run,
        "--micro-batch": 8,
    }
    assert not make.train(*make.small({**options, "--steps": 3, "--log-every": 1}, model), *source)
    logged = make.lines(run)
    assert len(logged) == 3
    for line in logged:
        assert line["loss"] == pytest.approx(line["loss/filip"] + 0.5 * line["loss/global"], rel=1e-5)
        assert "temperature/filip" in line
    results = used(run)
    assert "refused" not in results and any(name.endswith("/cmli/i2t_r1") for name in results["evaluated"])
    check_memory(load_config(run / "run.json", "the run"), BF16, 2)
