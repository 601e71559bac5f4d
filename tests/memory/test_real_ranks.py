"""The prediction against real gloo ranks: a few of the settings that `real_ranks.py` goes through."""

import pytest

from tests.conftest import run


@pytest.mark.slow
@pytest.mark.parametrize(
    "ranks, stage, exchange, kind",
    [
        ("3", "3", "ring", "document"),
        ("2", "2", "gather", "aspect"),
    ],
)
def test_predicted_equals_what_real_ranks_take(ranks, stage, exchange, kind):
    options = ["--ranks", ranks, "--stage", stage, "--accumulation", "2", "--checkpointing", "on"]
    options += ["--precision", "bf16", "--exchange", exchange, "--kind", kind, "--blocks", "1"]
    done = run(*options, script="../tests/memory/real_ranks.py", timeout=600)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert done.stdout.count("predicted") == 1
    assert "predicted Count" not in done.stdout
