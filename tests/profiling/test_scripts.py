"""Numbers as they are given, and the order in which functions are timed."""

import pytest

from ds_cmli.common.errors import UserError
from profiling.scripts import compare, listed


def test_numbers_as_they_are_given():
    assert listed("--ranks", "1, 8", int) == [1, 8] and listed("--cuts", "1e-4", float) == [1e-4]
    for text in ("", "1,", "1,many", "0", "nan,-1"):
        with pytest.raises(UserError, match=f"--cuts is '{text}': give positive numbers"):
            listed("--cuts", text, float)


def test_functions_are_timed_in_turn():
    ran, now = [], iter(range(100))
    functions = {name: lambda name=name: ran.append(name) for name in "ab"}
    # Each reading of the clock is one later than the one before: every function takes 1.
    assert compare(functions, 3, lambda: next(now), warm_ups=1) == {"a": [1, 1, 1], "b": [1, 1, 1]}
    assert "".join(ran) == "abbaabba"
