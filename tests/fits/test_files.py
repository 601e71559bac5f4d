"""What programs save is loaded again, with the memory that this takes, and leaves files without values."""

from pathlib import Path

import pytest

from tests.fits.test_fits import fits


@pytest.mark.slow
def test_what_is_saved_is_loaded(tmp_path):
    done = fits("--limit", "1.2GB", "--", str(Path(__file__).parent / "saved.py"), cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "tensors were saved without their values: 7 times" in done.stdout
    assert "again.pt, kinds.safetensors, model.pt, model.safetensors, random.pt, 1 more" in done.stdout
