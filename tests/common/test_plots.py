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


def test_ticks_are_numbers_that_are_read():
    assert [plots.percent(value) for value in (0.000001, 0.001, 0.01, 0.1, 1, 10)] == [
        "0.0001%", "0.1%", "1%", "10%", "100%", "1,000%"
    ]  # fmt: skip
    assert [plots.plain(value) for value in (0.1, 20, 4096.0)] == ["0.1", "20", "4,096"]


def test_labels_are_moved_apart_around_their_middle_and_keep_their_order():
    assert plots.apart([], 1) == []
    assert plots.apart([0.0, 5.0], 1) == [0.0, 5.0]
    assert plots.apart([2.0, 2.0, 9.0], 1) == [1.5, 2.5, 9.0]
    assert plots.apart([3.0, 1.0, 3.5], 1) == [2.75, 1.0, 3.75]
    moved = plots.apart([1.0, 1.1, 2.0, 2.1, 5.0], 1)
    assert moved == pytest.approx([0.05, 1.05, 2.05, 3.05, 5.0])
