import json

import pytest

from tests.conftest import run


@pytest.mark.slow
def test_the_tables_are_printed_as_one_object():
    few = ["--preset", "tiny", "--batches", "2", "--train-steps", "1"]
    done = run(*few, "--json", script="profiling.speed.data")
    assert done.returncode == 0, done.stdout + done.stderr
    content = json.loads(done.stdout)
    assert content["loader_1_per_s"] > 0
    assert 0 < content["waiting_0"] < 1 and 0 < content["waiting_1"] < 1
    assert "of it waiting for its batch" in done.stderr
