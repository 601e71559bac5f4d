"""A run's folder that cannot be written while it trains, and files removed between two starts."""

import json
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from ds_cmli.checkpoint import contents, files
from ds_cmli.common import tensor_file
from ds_cmli.run import Run
from tests.checkpoint.runs import STEPS
from tests.drive_train import drive

pytestmark = pytest.mark.usefixtures("alone")
STUDENTS = ("student.safetensors", "student_ema.safetensors")


def strike_at(monkeypatch, step: int, strike) -> None:
    end_step = Run.end_step

    def ended(run, result):
        end_step(run, result)
        if run.state.step == step:
            strike(run.checkpoints.folder)

    monkeypatch.setattr(Run, "end_step", ended)


def assert_whole(folder: Path) -> None:
    """All that the end of a run names is there, and undamaged."""
    steps = [line["step"] for line in map(json.loads, (folder / "metrics.jsonl").open()) if "loss" in line]
    assert steps == list(range(1, STEPS + 1))
    assert json.loads((folder / "config.json").read_text())["config"]["run"]["preset"] == "tiny"
    for name in STUDENTS:
        assert tensor_file.damage(folder / name) is None
    assert contents.find("auto", folder).state.step == STEPS
    assert files.problem(folder / "checkpoint" / f"step{STEPS}") is None
    assert list((folder / "tensorboard").glob("events*"))


def remove(folder):
    (folder / "metrics.jsonl").unlink()


def cut(folder):
    with (folder / "metrics.jsonl").open("r+b") as file:
        file.truncate(100)


def checkpoints_a_file(folder):
    (folder / "checkpoint").rename(folder / "away")
    (folder / "checkpoint").write_text("")
    return lambda: (folder / "away").rename(folder / "checkpoint") if (folder / "checkpoint").unlink() is None else None


def metrics_a_folder(folder):
    (folder / "metrics.jsonl").rename(folder / "metrics.away")
    (folder / "metrics.jsonl").mkdir()
    (folder / "checkpoint").rename(folder / "away")
    (folder / "checkpoint").write_text("")

    def undo():
        (folder / "metrics.jsonl").rmdir()
        (folder / "metrics.away").rename(folder / "metrics.jsonl")
        (folder / "checkpoint").unlink()
        (folder / "away").rename(folder / "checkpoint")

    return undo


def read_only(folder):
    for command in (["mount", "--bind", folder, folder], ["mount", "-o", "remount,ro,bind", folder]):
        if subprocess.run(command, capture_output=True).returncode:
            pytest.skip("cannot mount here")
    return lambda: subprocess.run(["umount", "-l", folder], check=True)


def full_disk(folder):
    disk_usage, shutil.disk_usage = shutil.disk_usage, lambda path: SimpleNamespace(free=1_000_000)
    return lambda: setattr(shutil, "disk_usage", disk_usage)


@pytest.mark.parametrize("strike", [checkpoints_a_file, metrics_a_folder, read_only, full_disk])
def test_a_folder_that_cannot_be_written_costs_warnings_and_the_exit_code(
    strike, arguments, tmp_path, monkeypatch, capfd
):
    undo = []
    with monkeypatch.context() as patch:
        strike_at(patch, 5, lambda folder: undo.append(strike(folder)))
        try:
            assert drive([*arguments, str(tmp_path / "run")], mistakes=True) == 2
        finally:
            undo[0]()
    printed = capfd.readouterr()
    # Where `checkpoint` is a file now, there is none before.
    kept = "the one before stays" if strike in (read_only, full_disk) else "there is none before"
    assert f"warning: no checkpoint at step 6, {kept}: " in printed.out
    assert "error: the last checkpoint could not be written (" in printed.out
    assert "Traceback" not in printed.err
    assert f"step {STEPS}/{STEPS}" in printed.out  # it has trained on
    kept = {name: (tmp_path / "run" / name).read_bytes() for name in STUDENTS}
    (tmp_path / "run" / "run.lock").unlink(missing_ok=True)  # this process lives on
    assert drive([*arguments, str(tmp_path / "run")]) == 0
    assert_whole(tmp_path / "run")
    # Where they could be written, the weights of the end were there without their checkpoint.
    are_there = f"student.safetensors has the weights of step {STEPS}" in printed.out
    assert are_there == (strike is not read_only)
    for name in STUDENTS:
        assert (kept[name] == (tmp_path / "run" / name).read_bytes()) == are_there


def test_a_first_checkpoint_without_room_has_none_before_it(arguments, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10_000))
    assert drive([*arguments, str(tmp_path / "run"), "--steps", "1"], mistakes=True) == 2
    out = capfd.readouterr().out
    assert "warning: no checkpoint at step 1, there is none before: it needs about " in out
    assert "the one before" not in out


@pytest.mark.parametrize("strike, had", [(remove, 0), (cut, 0)])
def test_metrics_gone_between_two_starts_are_told(strike, had, arguments, tmp_path, capfd):
    folder = tmp_path / "run"
    assert drive([*arguments, str(folder)], stop_at=5) == 85
    capfd.readouterr()
    assert drive([*arguments, str(folder)], stop_at=6) == 85  # whole: no line
    assert "lines up to step" not in capfd.readouterr().out
    strike(folder)
    assert drive([*arguments, str(folder)]) == 0
    (printed,) = [line for line in capfd.readouterr().out.splitlines() if "lines up to step" in line]
    assert printed == (
        f"warning: {folder / 'metrics.jsonl'} has {had} of the 6 lines up to step 6: it was removed or cut off since; "
        "the run goes on without them"
    )


def test_metrics_of_a_run_without_its_checkpoints_are_kept(arguments, tmp_path, capfd):
    folder = tmp_path / "run"
    assert drive([*arguments, str(folder)], stop_at=5) == 85
    before = (folder / "metrics.jsonl").read_bytes()
    shutil.rmtree(folder / "checkpoint")
    assert drive([*arguments, str(folder)]) == 0
    assert "has no checkpoint: starting over at step 1" in capfd.readouterr().out
    assert (folder / "metrics.former.jsonl").read_bytes() == before
    assert_whole(folder)
