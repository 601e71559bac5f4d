"""The prediction against real gloo ranks: a few of the settings that `real_ranks.py` goes through."""

import pytest

from tests.conftest import run


@pytest.mark.slow
@pytest.mark.parametrize(
    "ranks, stage, exchange, kind",
    [
        pytest.param("1", "1", "gather", "document", marks=pytest.mark.soak),
        # Each of its values is in one of those below.
        pytest.param("2", "2", "gather", "document", marks=pytest.mark.soak),
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


@pytest.mark.soak
def test_all_kinds_of_runs_in_pairs_of_values():
    """Each cell is predicted as it is measured, or refused by both in the same line."""
    done = run("--pairwise", "--ranks", "1", "2", script="../tests/memory/real_ranks.py", timeout=3600)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
