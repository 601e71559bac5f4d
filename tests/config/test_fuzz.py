"""A few of the random mistakes; `python -m tests.config.fuzz` tries hundreds."""

from tests.config.fuzz import fuzz


def test_random_mistakes_are_told_and_a_dry_run_ends_as_the_training_does():
    figures, failures = fuzz(5, seed=1, each=2)
    assert not failures
    assert figures["cases"] == 5 and figures["compared"] == 3 and figures["accepted"] == 2
