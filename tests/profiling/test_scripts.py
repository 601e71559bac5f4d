"""The order in which functions are timed."""

from profiling.scripts import compare


def test_functions_are_timed_in_turn():
    ran, now = [], iter(range(100))
    functions = {name: lambda name=name: ran.append(name) for name in "ab"}
    # Each reading of the clock is one later than the one before: every function takes 1.
    assert compare(functions, 3, lambda: next(now), warm_ups=1) == {"a": [1, 1, 1], "b": [1, 1, 1]}
    assert "".join(ran) == "abbaabba"
