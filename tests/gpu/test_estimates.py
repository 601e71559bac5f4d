"""The document's estimates on a GPU: each implementation's largest allocation equals the predicted one."""

import json
import sys

from tests.gpu import limits
from tests.gpu.figures import estimate_figures, judge
from tests.ranks import ROOT, clean_environment


def test_estimates(device, record_property, tmp_path):
    path = tmp_path / "rows.json"
    script = str(ROOT / "profiling" / "compare_estimates.py")
    command = [sys.executable, script, "--only", "E1,E2,E3,E5", "--json", str(path)]
    done = limits.run(command, 240, clean_environment(), tmp_path)
    assert done.returncode == 0, done.stderr
    judge(estimate_figures(json.loads(path.read_text())), record_property)
