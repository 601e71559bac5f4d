"""One run a folder: who holds it, and who is gone."""

import json
import os
import shutil
import subprocess
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
    (folder / LOCK).unlink(missing_ok=True)
    with run_lock(folder):
        content = json.loads((folder / LOCK).read_text())
    (folder / LOCK).write_text(json.dumps({**content, **changes}))
    os.utime(folder / LOCK, (time.time() - age,) * 2)


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
    assert list(tmp_path.iterdir()) == [] and is_free(tmp_path)


def test_a_holder_that_has_died_on_this_node_is_gone_at_once(tmp_path):
    process = subprocess.Popen(["sleep", "600"])
    started = psutil.Process(process.pid).create_time()
    write_lock(tmp_path, pid=process.pid, started=started)
    assert not is_free(tmp_path)
    process.kill()
    # Nobody has waited for it yet.
    ranks.poll(lambda: psutil.Process(process.pid).status() == psutil.STATUS_ZOMBIE, 60)
    assert is_free(tmp_path)
    process.wait()
    write_lock(tmp_path, pid=process.pid, started=started)
    assert is_free(tmp_path)
    write_lock(tmp_path, started=started - 1e6)  # its number belongs to another process now
    assert is_free(tmp_path)


def test_a_holder_on_another_node_is_gone_three_minutes_after_its_last_touch_and_its_successors_lock_stays(tmp_path):
    write_lock(tmp_path, LEASE_SECONDS - 10, host="another")
    assert not is_free(tmp_path)
    write_lock(tmp_path, LEASE_SECONDS + 1, host="another")
    with run_lock(tmp_path):
        write_lock(tmp_path, host="another")
    assert not is_free(tmp_path)


def test_what_is_no_whole_lock_is_free_and_a_pipe_is_one_line(tmp_path):
    for content in ("", "{", "[1]", "{}", '{"pid": "x"}', "[" * 100_000):
        (tmp_path / LOCK).write_text(content)
        assert is_free(tmp_path), content[:20]
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


def test_the_holder_touches_its_own_lock_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "LOCK_TOUCH_SECONDS", 0.05)
    with run_lock(tmp_path):
        os.utime(tmp_path / LOCK, (1, 1))
        ranks.poll(lambda: (tmp_path / LOCK).stat().st_mtime > 2, 10)
        write_lock(tmp_path, host="another")  # which has taken over
        os.utime(tmp_path / LOCK, (1, 1))
        time.sleep(0.3)
        assert (tmp_path / LOCK).stat().st_mtime == 1


def hold_in_rounds(rank: int, world: int, folders: list[str], start: float) -> None:
    """Hold each folder, all ranks at one time. Raises FileExistsError where another rank holds it as well."""
    for number, folder in enumerate(folders):
        time.sleep(max(0.0, start + 0.02 * number - time.time()))
        try:
            with run_lock(Path(folder)):
                Path(folder, "inside").touch(exist_ok=False)
                time.sleep(0.005)
                Path(folder, "inside").unlink()
        except UserError as error:
            assert "in use by process" in str(error), error


@pytest.mark.parametrize("world, rounds", [(2, 100), pytest.param(5, 50, marks=pytest.mark.slow)])
def test_of_simultaneous_starts_on_a_stale_lock_one_holds_the_folder(world, rounds, tmp_path):
    (tmp_path / "0").mkdir()
    write_lock(tmp_path / "0", pid=2**22 + 1)  # above all process numbers
    folders = [str(shutil.copytree(tmp_path / "0", tmp_path / f"{number}.copy")) for number in range(rounds)]
    ranks.run(hold_in_rounds, world, [], 0.0, group=False)  # the processes are there once this has returned
    ranks.run(hold_in_rounds, world, folders, time.time() + 0.5, group=False)
