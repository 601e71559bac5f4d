"""The null GPU itself: what README.md says of it."""

import json

import pytest

from tests.null_gpu.processes import run

pytestmark = pytest.mark.null_gpu


def checked(environment: dict[str, str]) -> dict:
    done = run(environment, "tests/null_gpu/checks.py")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_work_is_pending_until_somebody_waits(null_gpu):
    result = checked(null_gpu("4090", count=2))
    assert (result["name"], result["capability"], result["devices"]) == ("NVIDIA GeForce RTX 4090", [8, 9], 2)
    assert result["launches"] == 2
    assert result["out of memory"]
    assert result["events"] == [False, True, False, True]
    # 12 MiB in the graph's pool, and one launch of it.
    assert result["captured"] == [False, True, True, False, False, False, True, 1]
    assert result["reused"] == {"before": False, "after": True}
    assert result["values"] == {
        "copied": [0, 1, 2],
        "filled": [7, 7],
        "compared": [True, False, True],
        "all": [False, True, False],
        "sum": 8,
        "most": -2,
        "joined": [3, 0, 5, 3, 0],
        "masked": [3, 0, -100],
        "strided": [
            [[False, False], [False, False], [True, False]],
            [[4, 8], [16, 20]],
            [[0, 4], [6, 10]],
            [[False, True], [False, True]],
            [[1, 7], [3, 9], [5, 11]],
            [[1, 3, 5, 1], [7, 9, 11, 7]],
            [[1, 7, 1, 7], [3, 9, 3, 9], [5, 11, 5, 11]],
            [[1, 7], [1, 7]],
            [[0, 0, 1], [1, 2, 3]],
            [9, 27],
            [8, 12, 16],
            [5, 11],
            [True, True, True],
        ],
        "selected": [2, 30_000],
        "norm": 0,
        "finite": True,
        "foreach": [0, 0],
    }


def test_work_is_done_at_once_where_that_is_asked_for(null_gpu):
    result = checked(null_gpu("t4") | {"NULLGPU_EVENTS": "done"})
    assert result["events"] == [True] * 4
    assert result["reused"] == {"before": True, "after": True}
