"""Trackers beside metrics.jsonl: TensorBoard, wandb and mlflow themselves, without a network."""

import importlib.util
import json
import os
import subprocess
import sys
import time

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ds_cmli import train
from ds_cmli.common.errors import UserError
from ds_cmli.config.presets import load_preset
from ds_cmli.metrics import Writer
from tests.config.test_mistakes import fail

LOGGED = {"loss": 3.5, "loss/cmli": 2.25, "lr": 1e-3, "pairs_per_s": 10.0}
FOUND = {"eval/seen/combined/i2t_r1": 0.5}
PICTURE = np.full((20, 30, 3), 7, np.uint8)


def write(folder, name, steps, first_step=0):
    if not (folder / "config.json").exists():
        (folder / "config.json").write_text(json.dumps({"config": load_preset("tiny", {}).to_dict()}))
    writer = Writer(folder, 4, first_step, [name])
    for step in steps:
        writer.log(step, LOGGED)
    writer.log(steps[-1], FOUND)
    writer.picture(steps[-1], "match-maps/seen/0", PICTURE)
    writer.close()


def test_tensorboard_shows_each_step_once_and_that_from_which_a_run_goes_on(tmp_path):
    """Step 3 was taken before the run was stopped, and again from the checkpoint of step 2."""
    write(tmp_path, "tensorboard", [1, 2, 3])
    write(tmp_path, "tensorboard", [3, 4], first_step=2)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("loss/total")] == [1, 2, 3, 4]


@pytest.mark.slow
def test_mlflow_holds_numbers_settings_and_pictures_of_a_run_that_goes_on(tmp_path, monkeypatch, capfd):
    pytest.importorskip("mlflow")
    from mlflow import MlflowClient
    from mlflow.store.tracking import file_store

    def slow(path, content):
        """A disk on which a file is there before what it holds."""
        with open(path, "a") as file:
            time.sleep(0.1)
            file.write(content)

    monkeypatch.setattr(file_store, "append_to", slow)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "store").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    folder = tmp_path / "run"
    folder.mkdir()
    write(folder, "mlflow", [1, 2])
    write(folder, "mlflow", [3], first_step=2)
    client = MlflowClient()
    experiment = client.get_experiment_by_name("ds-cmli")
    (entry,) = client.search_runs([experiment.experiment_id])
    assert entry.info.run_id == (folder / "mlflow" / "run-id").read_text() and entry.info.run_name == "run"
    points = client.get_metric_history(entry.info.run_id, "loss/total")
    assert sorted((p.step, p.value) for p in points) == [(1, 3.5), (2, 3.5), (3, 3.5)]
    assert entry.data.metrics["retrieval/seen/combined/i2t_r1"] == 0.5
    assert entry.data.params["run.preset"] == "tiny" and entry.data.params["losses"] == "global,cmli,target_cmli"
    assert len([f for f in client.list_artifacts(entry.info.run_id, "images") if f.path.endswith(".png")]) == 2
    printed = capfd.readouterr()
    assert "warning" not in printed.out and not printed.err


def test_wandb_holds_numbers_and_pictures_offline(tmp_path, monkeypatch, capfd):
    pytest.importorskip("wandb").teardown()  # what was set up in this process before looks at no environment again
    from wandb.sdk.data_types._private import MEDIA_TMP

    os.makedirs(MEDIA_TMP.name, exist_ok=True)  # a process that another test has forked removes it at its end
    monkeypatch.setenv("WANDB_MODE", "offline")
    write(tmp_path, "wandb", [1, 2])
    name = (tmp_path / "wandb" / "run-id").read_text()
    write(tmp_path, "wandb", [3], first_step=2)
    one, two = sorted((tmp_path / "wandb").glob("offline-run-*"))
    assert one.name.endswith(name) and two.name.endswith(name)
    assert len(list(one.glob("files/media/images/match-maps/seen/*.png"))) == 1
    content = next(one.glob("*.wandb")).read_bytes()
    assert b"loss/total" in content and b"retrieval/seen/combined/i2t_r1" in content and b"context_length" in content
    assert "warning" not in capfd.readouterr().out


def test_what_a_tracker_raises_later_is_told_once_and_the_run_goes_on(tmp_path, monkeypatch, capsys):
    writer = Writer(tmp_path, 4)

    class Broken:
        errors = (Exception,)

        def numbers(self, step, values):
            raise RuntimeError("the server is gone")

        def close(self):
            raise RuntimeError("the server is gone")

    writer.trackers["wandb"] = Broken()
    for step in (1, 2):
        writer.log(step, LOGGED)
    writer.close()
    assert capsys.readouterr().out.count("warning: wandb cannot be written now: the server is gone") == 1
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


def test_one_that_is_not_installed_is_one_line(tmp_path, monkeypatch, capsys):
    result = importlib.util.find_spec
    missing = ("wandb", "mlflow")
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *a: None if n in missing else result(n, *a))
    arguments = ["--preset", "tiny", "--output-dir", str(tmp_path / "run")]
    for name in missing:
        line = fail(train.command, [*arguments, "--set", f'run.report_to=["{name}"]'], monkeypatch, capsys)
        assert line == f"error: run.report_to has '{name}', which is not installed: pip install {name}"
    line = fail(train.command, [*arguments, "--set", 'run.report_to=["wadnb"]'], monkeypatch, capsys)
    assert line == ("error: run.report_to is ['wadnb']: did you mean 'wandb'? Or give the --plugin that registers it")


def test_one_that_cannot_be_opened_is_one_line(tmp_path, monkeypatch):
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "nonsense://nowhere")
    (tmp_path / "config.json").write_text(json.dumps({"config": load_preset("tiny", {}).to_dict()}))
    with pytest.raises(UserError, match=r"run.report_to has 'mlflow', which cannot be opened: .*MLFLOW_TRACKING_URI"):
        Writer(tmp_path, 4, 0, ["mlflow"])


@pytest.mark.slow
def test_no_tracker_is_imported_unasked_and_the_first_line_comes_before_heavy_imports():
    code = (
        "import sys, time; started = time.process_time(); sys.argv = ['train.py', '--preset', 'tiny', '--dry-run'];"
        "from ds_cmli import train; from ds_cmli.common import cli;"
        "train.quiet.silence = lambda: (print(sorted({'torch', 'timm', 'deepspeed'} & {*sys.modules})), sys.exit());"
        "cli.exit_code(train.command)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    first, imported = done.stdout.splitlines()
    assert first.startswith("ds-cmli ") and "preset tiny" in first and imported == "[]"
    code = (
        "import sys; from ds_cmli.common import quiet\nwith quiet.without_trackers():\n import deepspeed, timm\n"
        "print({'mlflow', 'wandb'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines()[-1] == "set()", done.stderr
