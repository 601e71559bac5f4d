"""One run a folder: who holds it, and who is gone."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from ds_cmli.checkpoint import lock
from ds_cmli.checkpoint.lock import JOB, LEASE_SECONDS, LOCK, run_lock
from ds_cmli.errors import UserError
from tests import ranks

pytestmark = pytest.mark.usefixtures("alone")


def write_lock(folder: Path, age: float = 0.0, **changes) -> None:
    """Write the lock of this process, with changes, last touched `age` seconds ago."""
    path = folder / LOCK
    path.unlink(missing_ok=True)
    with run_lock(folder):
        content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, **changes}))
    touched = time.time() - age
    os.utime(path, (touched, touched))


def is_free(folder: Path) -> bool:
    try:
        with run_lock(folder):
            return True
    except UserError as error:
        assert "\n" not in str(error) and "in use by process" in str(error)
        return False


def test_a_second_start_is_refused_and_the_lock_goes_with_its_run(tmp_path):
    with run_lock(tmp_path):
        assert not is_free(tmp_path)
        assert (tmp_path / LOCK).is_file()
    assert list(tmp_path.iterdir()) == []
    assert is_free(tmp_path)


def test_a_holder_that_has_died_on_this_node_is_gone_at_once(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    started = psutil.Process(process.pid).create_time()
    write_lock(tmp_path, pid=process.pid, started=started)
    assert not is_free(tmp_path)
    process.kill()
    while psutil.Process(process.pid).status() != psutil.STATUS_ZOMBIE:  # nobody has waited for it yet
        time.sleep(0.01)
    assert is_free(tmp_path)
    process.communicate()
    write_lock(tmp_path, pid=process.pid, started=started)
    assert is_free(tmp_path)
    write_lock(tmp_path, started=started - 1e6)  # its number belongs to another process now
    assert is_free(tmp_path)


def test_a_holder_on_another_node_is_gone_three_minutes_after_its_last_touch(tmp_path):
    write_lock(tmp_path, LEASE_SECONDS - 10, host="another")
    assert not is_free(tmp_path)
    write_lock(tmp_path, LEASE_SECONDS + 1, host="another")
    assert is_free(tmp_path)


def test_a_run_that_has_lost_its_folder_leaves_the_lock_of_the_next(tmp_path):
    with run_lock(tmp_path):
        write_lock(tmp_path, host="another")
    assert json.loads((tmp_path / LOCK).read_text())["host"] == "another"
    assert not is_free(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[1]", "{}", '{"pid": "x"}', "[" * 100_000])
def test_a_lock_that_was_not_written_whole_is_free(tmp_path, content):
    (tmp_path / LOCK).write_text(content)
    assert is_free(tmp_path)


def test_a_pipe_in_the_place_of_the_lock_is_one_line(tmp_path):
    os.mkfifo(tmp_path / LOCK)
    with pytest.raises(UserError, match=rf"{LOCK} is no file: remove it"), run_lock(tmp_path):
        pass


def test_a_requeued_job_takes_over_from_its_own_earlier_start(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    for job, expected in ((["7", "0"], True), (["7", None], True), (["7", "1"], False), (["8", "0"], False)):
        write_lock(tmp_path, host="another", job=job)
        assert is_free(tmp_path) == expected, job
    monkeypatch.setenv(JOB, "cmli")  # another scheduler's
    write_lock(tmp_path, host="another", job=["cmli", "an earlier start"])
    assert is_free(tmp_path)


def test_the_holder_touches_its_lock_and_no_other(tmp_path, monkeypatch):
    def is_touched(seconds: float) -> bool:
        os.utime(tmp_path / LOCK, (1, 1))
        end = time.monotonic() + seconds
        while (tmp_path / LOCK).stat().st_mtime < 2 and time.monotonic() < end:
            time.sleep(0.02)
        return (tmp_path / LOCK).stat().st_mtime > 2

    monkeypatch.setattr(lock, "TOUCH_SECONDS", 0.05)
    with run_lock(tmp_path):
        assert is_touched(10)
        content = (tmp_path / LOCK).read_text()
        (tmp_path / LOCK).unlink()
        (tmp_path / LOCK).write_text(content)  # of a start that has taken over
        assert not is_touched(0.3)


def wait_to_start(rank: int, world: int) -> None:
    """Do nothing: the processes of `ranks.run` are there once this has returned."""


def hold_in_rounds(rank: int, world: int, folders: list[str], start: float, seconds: float) -> list[str]:
    """Try to hold each folder, all ranks at one time; what has gone wrong."""
    mistakes = []
    for number, folder in enumerate(folders):
        while time.time() < start + number * seconds:
            pass
        try:
            with run_lock(Path(folder)):
                inside = Path(folder, "inside")
                try:
                    inside.touch(exist_ok=False)
                except FileExistsError:
                    mistakes.append(folder)
                time.sleep(seconds / 4)
                inside.unlink(missing_ok=True)
        except UserError as error:
            if "in use by process" not in str(error):
                mistakes.append(str(error))
    return mistakes


@pytest.mark.parametrize("world, rounds", [(2, 200), pytest.param(5, 50, marks=pytest.mark.slow)])
def test_of_simultaneous_starts_on_a_stale_lock_one_holds_the_folder(world, rounds, tmp_path):
    folders = [tmp_path / str(number) for number in range(rounds)]
    write_lock(tmp_path, pid=2**22 + 1)  # above all process numbers
    for folder in folders:
        folder.mkdir()
        (folder / LOCK).write_bytes((tmp_path / LOCK).read_bytes())
    ranks.run(wait_to_start, world, group=False)
    start = time.time() + 0.5
    mistakes = ranks.run(hold_in_rounds, world, [*map(str, folders)], start, 0.02, group=False)
    assert mistakes == [[]] * world
    assert not any(folder.joinpath(LOCK).exists() for folder in folders)
