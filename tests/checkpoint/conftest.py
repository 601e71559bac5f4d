"""Fixtures of the tests of checkpoints."""

import pytest

from tests.checkpoint.runs import STEPS
from tests.make import pairs
from tests.stranger.drive import ONE_BLOCK


@pytest.fixture(scope="module")
def arguments(tmp_path_factory) -> list[str]:
    data = pairs(tmp_path_factory.mktemp("data") / "pairs", count=33)
    return ["--preset", "tiny", "--steps", str(STEPS), "--log-every", "1", "--save-every", "3", "--data", data,
            "--set", "run.match_maps=0", "--set", "optim.ema_decay=0.5", *ONE_BLOCK, "--output-dir"]  # fmt: skip
