"""One run a folder: who holds it, and who is gone."""

import json
import os
import subprocess
import sys
import time

import psutil
import pytest

from ds_cmli.checkpoint import run_folder
from ds_cmli.checkpoint.run_folder import JOB, LEASE, LOCK, held
from ds_cmli.errors import UserError

pytestmark = pytest.mark.usefixtures("alone")


def holder(folder, age: float = 0.0, **changes) -> None:
    """A lock of this process, but for the changes."""
    (folder / LOCK).unlink(missing_ok=True)
    with held(folder):
        content = json.loads((folder / LOCK).read_text())
    (folder / LOCK).write_text(json.dumps({**content, **changes}))
    os.utime(folder / LOCK, (time.time() - age,) * 2)


def free(folder) -> bool:
    try:
        with held(folder):
            return True
    except UserError as error:
        assert "\n" not in str(error) and "in use by process" in str(error)
        return False


def test_a_second_start_is_refused_and_the_lock_goes_with_its_run(tmp_path):
    with held(tmp_path):
        assert not free(tmp_path)
        assert (tmp_path / LOCK).is_file()
    assert list(tmp_path.iterdir()) == [] and free(tmp_path)


def test_a_holder_that_has_died_here_is_gone_at_once(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    started = psutil.Process(process.pid).create_time()
    holder(tmp_path, pid=process.pid, started=started)
    assert not free(tmp_path)
    process.kill()
    while psutil.Process(process.pid).status() != psutil.STATUS_ZOMBIE:  # nobody has waited for it yet
        time.sleep(0.01)
    assert free(tmp_path)
    process.communicate()
    holder(tmp_path, pid=process.pid, started=started)
    assert free(tmp_path)
    holder(tmp_path, started=started - 1e6)  # its number belongs to another process now
    assert free(tmp_path)


def test_a_holder_elsewhere_is_gone_after_its_lease_and_may_have_taken_over(tmp_path):
    holder(tmp_path, host="there")
    assert not free(tmp_path)
    holder(tmp_path, LEASE + 1, host="there")
    with held(tmp_path):
        holder(tmp_path, host="there")
    assert not free(tmp_path)  # whose lock stays


def test_a_lock_that_was_not_written_whole_is_free(tmp_path):
    for content in ("", "{", "[1]", "{}", '{"pid": "x"}'):
        (tmp_path / LOCK).write_text(content)
        assert free(tmp_path), content


def test_a_requeued_job_takes_over_its_own_earlier_start(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    for job, expected in ((["7", "0"], True), (["7", None], True), (["7", "1"], False), (["8", "0"], False)):
        holder(tmp_path, host="there", job=job)
        assert free(tmp_path) == expected
    monkeypatch.setenv(JOB, "cmli")  # another scheduler's
    holder(tmp_path, host="there", job=["cmli", "an earlier start"])
    assert free(tmp_path)


def test_the_holder_gives_signs(tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder, "TOUCH_SECONDS", 0.05)
    with held(tmp_path):
        os.utime(tmp_path / LOCK, (1, 1))
        end = time.monotonic() + 10
        while (tmp_path / LOCK).stat().st_mtime < 2 and time.monotonic() < end:
            time.sleep(0.02)
        assert (tmp_path / LOCK).stat().st_mtime > 2
