"""Runs that are to be the same, and a file with code in it."""

import os
import signal
from pathlib import Path

import torch

from tests import make
from tests.ranks import start, wait_for


def assert_same(folder: Path, expected: Path) -> None:
    """Assert that two runs have the same losses, weights and averages, to the bit."""
    assert make.metrics(folder) == make.metrics(expected)
    for name in ("model.safetensors", "model.ema.safetensors", "model.best.safetensors"):
        file = folder / name
        expected_file = expected / name
        assert file.exists() == expected_file.exists(), name
        assert not file.exists() or file.read_bytes() == expected_file.read_bytes(), name


def stop_and_resume(folder: Path, command: list, env: dict[str, str]) -> None:
    """Check that a training of 30 steps which is stopped and resumed ends with the weights of one that is not."""

    def started(run: Path):
        return start([*command, "--steps", "30", "--log-every", "1", "--output-dir", run], env, folder / "output")

    whole = folder / "whole"
    stopped = folder / "stopped"
    codes = [started(whole).wait(600)]
    training = started(stopped)
    metrics = stopped / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and metrics.read_text().count('"loss"') >= 3, training, folder / "output")
    training.send_signal(signal.SIGTERM)
    codes += [training.wait(600), started(stopped).wait(600)]
    assert codes == [0, 85, 0], (folder / "output").read_text()[-2000:]
    assert [line["step"] for line in make.lines(stopped)] == [*range(1, 31)]
    torch.testing.assert_close(make.weights(stopped), make.weights(whole), rtol=0, atol=0)


class Code:
    """An object in a pickle, which makes a folder when it is loaded."""

    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)
