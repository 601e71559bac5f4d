"""The plan of our training: each line is what a prediction of its own says, and the printed command starts it."""

import json
import shlex
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from ds_cmli.allocator import gpus
from ds_cmli.config.deepspeed_config import DeepSpeedConfig
from ds_cmli.config.options import DEFAULT_JSON
from ds_cmli.fits.plan import Search, Settings, grid
from ds_cmli.memory.largest_rank import predict_largest
from ds_cmli.memory.plan import Planned
from tests.conftest import ROOT, clean_environment, free_port
from tests.fits.test_fits import COMMAND
from tests.memory.test_predict import preset
from tests.metrics_file import metrics

T4 = "T4 16GB"


@pytest.fixture(scope="module")
def planned(tmp_path_factory) -> Planned:
    """Two ranks of 1,024 pairs of `tiny`."""
    config = preset(losses=("global", "cmli"))
    ds_config = DeepSpeedConfig.load(DEFAULT_JSON).replaced(train_micro_batch_size_per_gpu=1024)
    folder = tmp_path_factory.mktemp("plan")
    return Planned(config, ds_config, 2, [T4], ["train.py"], str(folder / "plan.json"), lambda line: None)


@pytest.mark.slow
def test_each_line_is_a_prediction_of_its_own(planned):
    settings, _ = grid(planned.step)
    assert planned.step.own == Settings(2, True, False, False) and len(settings) == 12
    lines = Search(planned, [T4], planned.tell).lines(settings)
    assert len(lines) == 12
    for line in lines[::4]:
        config, ds_config = planned.changed(line.settings, line.micro_batch)
        stage, offload = ds_config.stage, ds_config.offload("optimizer") == "cpu"
        assert Settings(stage, ds_config.checkpointing, offload, bool(config.student.lora)) == line.settings
        assert ds_config.batch(0, 2) == (2048, line.micro_batch, 1024 // line.micro_batch)
        prediction = predict_largest(config, ds_config, 2, gpu=T4)
        assert prediction.report.totals["device"] == line.device
        assert (line.device <= gpus.find(T4).total.bytes) == bool(line.gpus)


@pytest.mark.slow
def test_the_printed_command_trains(tmp_path):
    given = ("--preset", "tiny", "--set", "optim.steps=2")
    command = [COMMAND, "plan", "--gpu", "T4", "--world-size", "2", "--micro-batch", "4", *given]
    with_package = clean_environment() | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    run = partial(subprocess.run, cwd=tmp_path, env=with_package, capture_output=True, text=True, timeout=600)
    done = run(command)
    assert done.returncode == 0, done.stderr
    start = shlex.split(done.stdout.splitlines()[-1])
    script = str(ROOT / "ds_cmli" / "train.py")
    first = ["deepspeed", "--num_gpus", "2", script]
    assert start == [*first, *given, "--deepspeed_config", "plan.json"]
    assert json.loads((tmp_path / "plan.json").read_text())["train_micro_batch_size_per_gpu"] == 4
    launcher = [str(Path(sys.executable).with_name("deepspeed")), "--master_port", str(free_port())]
    trained = run([*launcher, *start[1:], "--output-dir", "run"])
    assert trained.returncode == 0, trained.stdout + trained.stderr
    assert [line["step"] for line in metrics(tmp_path / "run") if "loss" in line] == [1, 2]
