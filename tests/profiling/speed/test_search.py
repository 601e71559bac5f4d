import json

from tests.conftest import run
from tests.run_folder import write_run


def test_the_exact_search_is_what_others_are_compared_with(tmp_path):
    options = ["--model", str(write_run(tmp_path)), "--images", "80", "--queries", "4", "--json"]
    done = run(*options, script="profiling.speed.search")
    assert done.returncode == 0, done.stdout + done.stderr
    content = json.loads(done.stdout)
    assert (content["images"], content["queries"], [*content["rows"]]) == (80, 4, ["10", "50", "exact"])
    # `tiny` has 16 patches of 16 numbers and a class token of 32, in two bytes each.
    assert 80 * 2 * (32 + 16 * 16) <= content["index_bytes"] < 80 * 2 * (32 + 16 * 16) + 4000
    assert content["rows"]["exact"]["recall_1"] == content["rows"]["exact"]["recall_10"] == 1
    assert 0 <= content["rows"]["10"]["recall_10"] <= content["rows"]["50"]["recall_10"] <= 1
    assert all(row["median_ms"] > 0 for row in content["rows"].values())
