"""A few of the random mistakes; `python -m tests.config.fuzz` tries hundreds."""

from tests.config.fuzz import fuzz


def test_random_mistakes_are_told_and_a_dry_run_ends_as_the_training_does():
    figures, failures = fuzz(16, seed=1)
    assert not failures
    assert figures["cases"] == 16 and figures["compared"] == 2 and figures["accepted"] >= 1
