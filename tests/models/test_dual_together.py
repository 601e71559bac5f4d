"""Trainings in which a source of each kind meets any two features: interrupted as if never, their memory predicted."""

from pathlib import Path

import pytest

from ds_cmli.export.__main__ import command as export
from tests.covering import not_met
from tests.export.libraries import run_of
from tests.models.dual_models import clip, siglip
from tests.models.interrupted import PLAIN, RUNS, train_and_break
from tests.run_folder import write_run

AXES = {
    "source": ("clip", "siglip", "export", "run"),  # an export of two encoders, a run that began as a CLIP
    "stage": ("zero1", "zero2", "zero3"),
    "ranks": ("alone", "two"),
    "precision": ("fp32", "bf16"),
    "negatives": ("one", "cached"),  # one micro-batch, or two
    "checkpointing": ("-", "recomputed"),
    "average": ("-", "ema"),  # with a rate for each layer
    "trained": ("-", "lora", "locked"),  # locked: the whole image tower
    "compile": ("-", "compiled"),
}


def test_any_two_values_of_two_axes_meet():
    assert not_met(AXES, RUNS) == []


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("sources")
    by_name = {"clip": clip(folder / "clip"), "siglip": siglip(folder / "siglip"), "export": folder / "export"}
    (folder / "plain").mkdir()
    write_run(folder / "plain")
    export.main([str(folder / "plain"), str(by_name["export"])], standalone_mode=False)
    by_name["run"] = run_of(by_name["clip"], folder / "run", {"global": 1.0, "cmli": 1.0})
    return by_name


@pytest.mark.slow
@pytest.mark.parametrize("run", PLAIN)
def test_a_training_from_a_source(run, sources, tmp_path, alone):
    values = run.split()
    train_and_break(values, sources[values[0]], tmp_path)
