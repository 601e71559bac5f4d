"""Blocks that are compiled under ZeRO-3 are its leaf modules, of which evaluation uses other methods than forward."""

from unittest import mock

import pytest

from tests.checkpoint.runs import json_file
from tests.drive_train import drive
from tests.make import pairs
from tests.metrics_file import metrics


def test_a_run_with_divided_leaf_modules_is_evaluated(tmp_path, alone):
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0}
    given = ["--preset", "tiny", "--losses", "global,cmli", "--steps", "2", "--eval-every", "1"]
    given += ["--data", pairs(tmp_path / "pairs", count=40), "--set", "run.compile=blocks", "--set", "run.match_maps=0"]
    given += [*json_file(tmp_path / "ds.json", {"zero_optimization": zero}), "--output-dir", str(tmp_path / "run")]
    with mock.patch("torch.compile", lambda function, **_: function):  # which takes minutes
        assert drive(given) == 0
    assert [line["step"] for line in metrics(tmp_path / "run") if "eval/val/pairs" in line] == [1, 2]


def test_the_first_layers_may_be_frozen(tmp_path, alone):
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0}
    given = ["--preset", "tiny", "--losses", "global,cmli", "--steps", "2"]
    given += ["--data", pairs(tmp_path / "pairs", count=40)]
    given += [*json_file(tmp_path / "ds.json", {"zero_optimization": zero}), "--set", "student.freeze_image=1"]
    losses = []
    for kind in ("off", "blocks"):
        with mock.patch("torch.compile", lambda function, **_: function):
            assert drive([*given, "--set", f"run.compile={kind}", "--output-dir", str(tmp_path / kind)]) == 0
        losses.append([line["loss"] for line in metrics(tmp_path / kind) if "loss" in line])
    assert len(losses[0]) == 2 and losses[1] == pytest.approx(losses[0], rel=1e-6)
