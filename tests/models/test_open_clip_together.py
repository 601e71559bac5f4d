"""Trainings that start from models of open_clip, in which any two features meet: as `test_dual_together.py`."""

import pytest

from tests.models import interrupted
from tests.models.interrupted import PLAIN, SETTINGS, train_and_break

pytest.importorskip("open_clip", reason="pip install 'ds-cmli[test]'")
from tests.models.open_clip_models import saved

# For each source of the other file one of open_clip, and its name there.
SOURCES = {
    "clip": ("open_clip", "vit"),
    "siglip": ("open_clip_siglip", "siglip"),
    "run": ("open_clip", "coca"),
    "export": ("open_clip_convnext", "convnext"),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    return {name: saved(folder / name, name) for _, name in SOURCES.values()}


@pytest.mark.slow
@pytest.mark.parametrize("run", PLAIN)
def test_a_training_from_a_source(run, folders, tmp_path, alone, monkeypatch):
    source, *values = run.split()
    kind, name = SOURCES[source]
    more: dict[str, dict[str, object]] = {}
    if kind != "open_clip":  # whose sides are no multiples of the teacher's patches
        more[kind] = {"teacher.overrides": {"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 16}}
    monkeypatch.setattr(interrupted, "SETTINGS", SETTINGS | more)
    train_and_break([kind, *values], folders[name], tmp_path)
