"""A few of the random mistakes; `python -m tests.config.fuzz` tries hundreds."""

import sys

import pytest

from tests.config.fuzz import fuzz
from tests.processes import python


@pytest.mark.slow
def test_random_mistakes_are_told_and_a_dry_run_ends_as_the_training_does(monkeypatch):
    monkeypatch.setattr(sys, "executable", python())
    figures, failures = fuzz(5, seed=1, trained=2)
    assert not failures
    assert figures["cases"] == 5 and figures["compared"] == 3 and figures["accepted"] == 2
