"""A tracker that this package has never seen: one entry, and a run writes to it."""

import json

import pytest

from ds_cmli.common.errors import UserError
from ds_cmli.config import registry
from ds_cmli.config.presets import load_preset
from ds_cmli.config.start_checks import check_trackers
from tests.config.test_mistakes import pairs
from tests.drive_train import drive
from tests.metrics_file import metrics


class Notebook:
    """A text file of numbers and of the sizes of pictures."""

    errors = (OSError,)

    def __init__(self, folder, first_step):
        if not (folder / "config.json").is_file():
            raise UserError("the run has no configuration")
        self.file = (folder / "notebook").open("a")
        print(f"from {first_step}", file=self.file)

    def numbers(self, step, values):
        print(step, json.dumps(values), file=self.file)

    def picture(self, step, name, image):
        print(step, name, *image.shape, file=self.file)

    def close(self):
        print("closed", file=self.file)
        self.file.close()


@pytest.fixture(autouse=True)
def registered(alone, monkeypatch):
    entry = registry.TrackerEntry(f"{__name__}:Notebook", "json")
    monkeypatch.setitem(registry.TRACKERS, "notebook", entry)


def test_a_run_writes_to_it_and_goes_on(tmp_path):
    run = tmp_path / "run"
    given = ["--preset", "tiny", "--data", pairs(tmp_path / "pairs", count=33), "--output-dir", str(run)]
    given += ["--steps", "2", "--log-every", "1", "--set", 'run.report_to=["notebook"]']
    assert drive(given, stop_at=1) == 85
    assert drive(given) == 0
    lines = (run / "notebook").read_text().splitlines()
    assert lines.count("closed") == 2 and lines[0] == "from 0" and "from 1" in lines
    logged = {line["step"]: line["loss"] for line in metrics(run) if "loss" in line}
    for step, loss in logged.items():
        assert any(line.startswith(f"{step} {{") and f'"loss/total": {loss}' in line for line in lines)
    assert sum("match-maps/" in line and line.endswith(" 3") for line in lines) == 2  # two pictures are held out


def test_its_name_and_its_library_are_checked(monkeypatch):
    with pytest.raises(UserError, match=r"run.report_to is \['notebok'\]: did you mean 'notebook'\?"):
        load_preset("tiny", {"run": {"report_to": ["notebok"]}})
    check_trackers(["notebook"])
    monkeypatch.setitem(registry.TRACKERS, "notebook", registry.TrackerEntry("x:Y", "not_installed_anywhere"))
    with pytest.raises(UserError, match="has 'notebook', which is not installed: pip install not_installed_anywhere"):
        check_trackers(["notebook"])
