import subprocess
import sys

import pytest

from ds_cmli.common import plots
from ds_cmli.common.errors import UserError
from tests.conftest import ROOT, clean_environment

# Runs a script as where matplotlib is not installed.
HIDDEN = (
    "import sys, runpy; sys.modules['matplotlib'] = None; del sys.argv[0]; "
    "runpy.run_path(sys.argv[0], run_name='__main__')"
)


@pytest.mark.parametrize("script, given", [("scale", []), ("estimators", []), ("replay", ["snapshot.json"])])
def test_a_picture_without_matplotlib_is_refused_before_the_work(script, given, tmp_path):
    (tmp_path / "snapshot.json").write_text("{}")
    command = [sys.executable, "-c", HIDDEN, str(ROOT / "profiling" / f"{script}.py"), *given, "--plot", "picture.png"]
    done = subprocess.run(command, cwd=tmp_path, env=clean_environment(), capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr == "error: --plot needs matplotlib: pip install matplotlib\n"


def test_charts_name_what_needs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert not plots.installed()
    with pytest.raises(UserError, match="the report, for its curves, needs matplotlib: pip install matplotlib"):
        plots.matplotlib("the report, for its curves,")
