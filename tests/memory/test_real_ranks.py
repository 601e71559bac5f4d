"""The prediction against real gloo ranks: a few of the settings that `real_ranks.py` goes through."""

import pytest

from tests.conftest import run


@pytest.mark.parametrize(
    "ranks, stage, exchange",
    [pytest.param("1", "1", "gather", marks=pytest.mark.soak), ("2", "2", "gather"), ("3", "3", "ring")],
)
def test_predicted_equals_what_real_ranks_take(ranks, stage, exchange):
    options = ["--ranks", ranks, "--stage", stage, "--accumulation", "2", "--checkpointing", "on"]
    options += ["--precision", "bf16", "--exchange", exchange]
    done = run(*options, script="../tests/memory/real_ranks.py", timeout=600)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert done.stdout.count("predicted") == 1
    assert "predicted Count" not in done.stdout
