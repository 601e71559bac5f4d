"""Runs in two pieces, and a file with code in it."""

import os
from pathlib import Path

from tests import make


def assert_same(folder: Path, other: Path) -> None:
    """Losses, weights and averages, to the bit."""
    assert make.metrics(folder) == make.metrics(other)
    for name in ("model.safetensors", "model.ema.safetensors"):
        files = [run / name for run in (folder, other)]
        assert files[0].exists() == files[1].exists()
        assert not files[0].exists() or files[0].read_bytes() == files[1].read_bytes()


def straight_and_stopped(given: list[str], folder: Path, stop_at: int, two: bool, *stopped: str) -> Path:
    """The folder of a training on one rank or two, the same as in two pieces; the first also gets `stopped`."""
    straight, broken = ([*given, "--output-dir", str(folder / name)] for name in ("straight", "broken"))
    assert make.train(*straight, world=1 + two) == 0
    assert make.train(*broken, *stopped, world=1 + two, stop_at=stop_at) == 85
    assert make.train(*broken, world=1 + two) == 0
    assert_same(folder / "straight", folder / "broken")
    return folder / "straight"


class Code:
    """In a pickle: makes a folder when it is loaded."""

    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)
