"""The document's estimates on a GPU: each implementation's largest allocation equals the predicted one."""

import json

from tests.gpu.figures import estimate_figures, judge
from tests.ranks import python


def test_estimates(device, record_property, tmp_path):
    path = tmp_path / "rows.json"
    done = python("profiling/compare_estimates.py", "--only", "E1,E2,E3,E5", "--json", path, timeout=600)
    assert done.returncode == 0, done.stderr
    judge(estimate_figures(json.loads(path.read_text())), record_property)
