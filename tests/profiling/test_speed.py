"""The order in which functions are timed."""

from profiling.speed.op import in_turn


def test_functions_are_timed_in_turn():
    ran, now = [], iter(range(100))
    functions = {name: lambda name=name: ran.append(name) or next(now) for name in "ab"}
    assert in_turn(functions, 3) == {"a": [1, 2, 5], "b": [0, 3, 4]}
    assert "".join(ran) == "baabba"
