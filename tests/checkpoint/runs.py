"""Runs that are to be the same, and a file with code in it."""

import os
from pathlib import Path

from tests import make


def assert_same(folder: Path, other: Path) -> None:
    """Losses, weights and averages, to the bit."""
    assert make.metrics(folder) == make.metrics(other)
    for name in ("model.safetensors", "model.ema.safetensors", "model.best.safetensors"):
        files = [run / name for run in (folder, other)]
        assert files[0].exists() == files[1].exists()
        assert not files[0].exists() or files[0].read_bytes() == files[1].read_bytes()


class Code:
    """In a pickle: makes a folder when it is loaded."""

    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)
