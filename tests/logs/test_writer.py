import errno
import json
import os
import resource
import sys
import time

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from ds_cmli import train
from ds_cmli.config.presets import load_preset
from ds_cmli.errors import UserError
from ds_cmli.logs.writer import Writer
from tests.ranks import python

FOUND = {"eval/seen/combined/i2t_r1": 0.5}
CHANCE = {"eval/seen/chance/i2t_r1": 0.1}
PICTURE = np.full((20, 30, 3), 7, np.uint8)
VALUES = {"loss": 3.5, "loss/global": 1.25, "loss/cmli": 2.25, "lr": 1e-3, "pairs_per_s": 10.0, "time/data": 0.041}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "run.json").write_text(json.dumps({"config": load_preset("tiny", {}).to_dict()}))
    return tmp_path


@pytest.mark.parametrize("terminal", [True, False])
def test_each_loss_is_shown_on_a_terminal_and_away_from_one(terminal, folder, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    writer = Writer(folder, 3)
    time.sleep(0.5)  # the first step compiles, which says nothing of the time that is left
    for step in (1, 2):
        writer.advance()
        writer.log(step, VALUES)
        writer.timed_since -= 179.7
    writer.close()
    shown = capsys.readouterr()
    first, second = [line for line in shown.out.splitlines() if "loss" in line]
    values = "  loss 3.5000  global 1.250  cmli 2.250  lr 1.00e-03  10 pairs/s  data 4%"
    assert f"step 2/3{values}" in second
    if terminal:
        assert "|" in shown.err and "2/3 [" in shown.err and "loss" not in shown.err  # the bar, and the time left
    else:
        assert not shown.err and "\r" not in shown.out
        assert first == f"step 1/3{values}" and second == f"step 2/3{values}  3m00s left"


def write(folder, steps, first_step=0, report_to="tensorboard"):
    writer = Writer(folder, 4, first_step, report_to)
    for step in steps:
        writer.advance()
        writer.log(step, VALUES)
    writer.log(steps[-1], FOUND | CHANCE)
    writer.picture(steps[-1], "match-maps/seen/0", PICTURE)
    writer.close()


def test_tensorboard_shows_each_step_once_and_that_from_which_a_run_goes_on(folder):
    """Step 3 was taken before the run was stopped, and again from the checkpoint of step 2."""
    write(folder, [1, 2, 3])
    time.sleep(1.1)  # files of events are read in the order of their names, which begin with the second
    write(folder, [3, 4], first_step=2)
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("loss/total")] == [1, 2, 3, 4]
    assert FOUND.keys() <= set(events.Tags()["scalars"])
    assert not CHANCE.keys() & set(events.Tags()["scalars"])


@pytest.mark.slow
def test_wandb_gets_what_tensorboard_gets_offline(folder):
    """It runs in another process, because wandb changes TensorBoard's writer for good."""
    pytest.importorskip("wandb")
    code = "import sys; from pathlib import Path; from tests.logs.test_writer import write;"
    code += "write(Path(sys.argv[1]), [1, 2], 0, 'wandb')"
    done = python("-c", code, folder, env={**os.environ, "WANDB_MODE": "offline", "WANDB_DIR": str(folder / "x")})
    assert done.returncode == 0 and "warning" not in done.stdout, done.stderr
    (run_folder,) = (folder / "x" / "wandb").glob("offline-run-*")
    assert run_folder.name.endswith((folder / "wandb" / "run-id").read_text())  # by which the next start goes on
    content = next(run_folder.glob("*.wandb")).read_bytes()
    assert b"loss/total" in content and b"eval/seen/combined/i2t_r1" in content and b"context_length" in content
    assert len(list(run_folder.glob("files/media/images/**/*.png"))) == 1


def test_a_wandb_that_is_not_installed_is_refused(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    arguments = ["--preset", "tiny", "--output-dir", str(tmp_path / "run"), "--set", "run.report_to=wandb"]
    with pytest.raises(UserError, match=r"^run.report_to is .wandb.: [^\n]*wandb[^\n]*$"):
        train.command.main(arguments, standalone_mode=False)


@pytest.mark.slow
def test_the_first_line_comes_before_heavy_imports_and_those_are_without_trackers():
    code = """
import resource
import sys
from ds_cmli import commands, libraries, train
sys.argv = ["train.py", "--preset", "tiny", "--dry-run"]
train.silence = lambda: print({"torch", "timm", "deepspeed"} & {*sys.modules})
commands.exit_code(train.command)
with libraries.importing():
    import deepspeed, timm
print({"mlflow", "wandb"} & {*sys.modules})
"""
    done = python("-c", code, timeout=120)
    first, second, *_, last = done.stdout.splitlines()
    assert first.startswith("ds-cmli ") and "preset tiny" in first and second == last == "set()", done.stderr


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_disk_that_fills_and_empties_costs_one_warning_and_the_lines_of_that_time(folder, capsys):
    writer = Writer(folder, 4)
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    for step, max_bytes in ((1, unlimited[0]), (2, 150), (3, 150), (4, unlimited[0])):  # of any file
        resource.setrlimit(resource.RLIMIT_FSIZE, (max_bytes, unlimited[1]))
        writer.advance()
        writer.log(step, VALUES)
        time.sleep(0.1)  # TensorBoard's file is written by a thread
    writer.close()
    assert [json.loads(line)["step"] for line in (folder / "metrics.jsonl").open()] == [1, 4]
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    assert 4 in [event.step for event in events.Scalars("loss/total")]
    warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == 1 and "metrics.jsonl cannot be written (File too large)" in warnings[0]


def test_a_disk_that_is_full_when_a_run_starts_costs_one_warning(folder, capsys, monkeypatch):
    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(SummaryWriter, "add_text", fail)  # TensorBoard's thread has ended by then
    writer = Writer(folder, 1)
    writer.close()
    assert capsys.readouterr().out.count("warning: TensorBoard's file cannot be written (No space left") == 1
