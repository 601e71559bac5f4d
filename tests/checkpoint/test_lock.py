"""One run a folder: who holds it, who is gone, and names that two starts cannot share."""

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from ds_cmli.checkpoint import contents, lock, run_folder, save
from ds_cmli.checkpoint.lock import LEASE, NAME, Lock, _started
from ds_cmli.common.errors import UserError
from ds_cmli.metrics import Writer
from tests.checkpoint.runs import TINY
from tests.drive_train import drive

pytestmark = pytest.mark.usefixtures("alone")


@pytest.fixture(autouse=True)
def no_looking(monkeypatch):
    """These tests take locks from each other, which ends a process at its next look."""
    monkeypatch.setattr(lock, "LOOK_SECONDS", 1e6)
    monkeypatch.setattr(lock, "HANDOVER", 0.0)
    monkeypatch.setattr(lock, "_held", [])


def holder(folder, age: float = 0.0, **changes) -> None:
    """A lock of another process than this one."""
    path = folder / NAME
    path.write_text(json.dumps({**Lock(folder).mine, "token": "other", **changes}))
    os.utime(path, (time.time() - age,) * 2)


def test_a_second_start_ends_in_one_line_and_the_lock_goes_with_its_run(tmp_path):
    first = Lock(tmp_path)
    assert first.take() is None
    line = Lock(tmp_path).take()
    assert line is not None and f"in use since {first.mine['since']} by process {os.getpid()} on " in line
    assert "\n" not in line and "give another --output-dir" in line
    first.give_back()
    assert list(tmp_path.iterdir()) == []
    assert Lock(tmp_path).take() is None


def test_a_holder_that_has_died_here_is_gone_at_once(tmp_path):
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        started = _started(process.pid)
        process.kill()
        end = time.monotonic() + 10
        while _started(process.pid) and time.monotonic() < end:  # a zombie: nobody has waited for it yet
            time.sleep(0.01)
        holder(tmp_path, pid=process.pid, started=started)
        assert Lock(tmp_path).take() is None
    holder(tmp_path, pid=process.pid, started=started)
    assert Lock(tmp_path).take() is None
    holder(tmp_path, started="1")  # its number belongs to another process now
    assert Lock(tmp_path).take() is None
    assert [path.name for path in tmp_path.iterdir()] == [NAME]


def test_a_holder_elsewhere_is_gone_after_its_lease(tmp_path):
    holder(tmp_path, host="there", place="there")
    line = Lock(tmp_path).take()
    assert line is not None and "on there" in line and f"without one for {LEASE:.0f} s the folder is free" in line
    holder(tmp_path, LEASE + 1, host="there", place="there")
    assert Lock(tmp_path).take() is None


def test_a_requeued_job_takes_over_its_own_earlier_start(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    for slurm, free in ((["7", "0"], True), (["7", None], True), (["7", "1"], False), (["8", "0"], False)):
        holder(tmp_path, place="there", job=slurm)
        assert (Lock(tmp_path).take() is None) == free


def test_another_scheduler_names_its_job(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "HANDOVER", 0.0)
    monkeypatch.setenv(lock.JOB, "cmli")
    for name, free in (("cmli", True), ("other", False), (None, False)):
        holder(tmp_path, place="there", job=[name, "a token"])
        assert (Lock(tmp_path).take() is None) == free
    (tmp_path / NAME).unlink()
    started = [Lock(tmp_path) for _ in range(2)]
    started[0].mine["place"] = "there"
    assert [item.take() for item in started] == [None, None]  # the second is a later start of the same job


def test_an_earlier_start_of_the_job_that_may_still_run_is_given_time(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setattr(lock, "HANDOVER", 0.3)
    expected = {"pid": os.getppid(), "started": _started(os.getppid())}
    gone = {"pid": os.getppid(), "started": "1"}
    for who, waits in ((expected, True), (gone, False), ({"place": "there"}, True)):
        holder(tmp_path, job=["7", "0"], **who)
        began = time.monotonic()
        assert Lock(tmp_path).take() is None
        assert (time.monotonic() - began > 0.3) == waits


def test_a_holder_suspended_for_its_successors_whole_life_writes_no_more(tmp_path, monkeypatch):
    ended = []
    monkeypatch.setattr(lock.Lock, "_leave", lambda self, holder: ended.append(holder["pid"]))
    suspended = Lock(tmp_path)
    suspended.mine["place"] = "there"
    assert suspended.take() is None
    holder_age = time.time() - LEASE - 1
    os.utime(tmp_path / NAME, (holder_age, holder_age))
    for _ in range(2):  # the second successor finds what the first has left
        successor = Lock(tmp_path)
        assert successor.take() is None
        successor.give_back()
        suspended.end_if_lost()
    assert ended == [os.getpid()] * 2
    gone = tmp_path / "gone"
    gone.mkdir()
    holder(gone, pid=os.getppid(), started="1")  # its process has ended: nobody is left to be told
    after = Lock(gone)
    assert after.take() is None
    after.give_back()
    assert not (gone / NAME).exists()


def writes_a_line(folder):
    Writer(folder, 9).log(2, {"loss": 1.0})


def begins_a_checkpoint(folder):
    save._prepare(folder / "checkpoint", None, 2)  # type: ignore[arg-type]


def publishes_a_checkpoint(folder):
    save._publish(folder, folder / "checkpoint", "step2", 1, None)


def looks_by_itself(folder):
    time.sleep(20)


@pytest.mark.parametrize("write", [writes_a_line, begins_a_checkpoint, publishes_a_checkpoint, looks_by_itself])
def test_who_has_lost_the_lock_writes_no_more(tmp_path, monkeypatch, write):
    for name in ("checkpoint/step2.writing", "checkpoint/step1"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("metrics.jsonl", "student.safetensors", "student.safetensors.writing", "checkpoint/latest"):
        (tmp_path / name).write_text("step1")
    if write is looks_by_itself:
        monkeypatch.setattr(lock, "LOOK_SECONDS", 0.05)
    child = os.fork()
    if child == 0:
        Lock(tmp_path).take()
        holder(tmp_path, host="there")
        write(tmp_path)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 2
    assert (tmp_path / "student.safetensors.writing").exists() and (tmp_path / "checkpoint" / "step1").exists()
    for name in ("metrics.jsonl", "student.safetensors", "checkpoint/latest"):
        assert (tmp_path / name).read_text() == "step1"


def test_what_an_earlier_holder_was_writing_is_removed(tmp_path):
    for name in ("checkpoint/step2.writing", "checkpoint/step1"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "student.safetensors.writing").touch()
    contents.remove_incomplete(tmp_path)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["checkpoint", "step1"]


@pytest.mark.parametrize("content", ["", "{", "[]", "\x00"])
def test_a_damaged_lock_is_in_use_while_it_is_young(tmp_path, content):
    (tmp_path / NAME).write_text(content)
    line = Lock(tmp_path).take()
    assert line is not None and "another start is just making it" in line
    os.utime(tmp_path / NAME, (0, 0))
    assert Lock(tmp_path).take() is None


def test_of_many_starts_at_a_stale_lock_one_gets_it(tmp_path):
    for i in range(20):
        folder = tmp_path / str(i)
        folder.mkdir()
        holder(folder, started="1")
        with ThreadPoolExecutor(8) as pool:
            lines = list(pool.map(lambda _: Lock(folder).take(), range(8)))  # noqa: B023
        assert lines.count(None) == 1
        assert [path.name for path in folder.iterdir()] == [NAME]


def test_who_died_while_taking_over_hinders_nobody(tmp_path):
    holder(tmp_path, started="1")
    child = os.fork()
    if child == 0:
        lock.os.replace = lambda *_: os._exit(1)
        Lock(tmp_path).take()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1
    for left in tmp_path.glob(f"{NAME}.*"):  # what it had written of its own lock
        if left.suffix != ".turn":
            left.unlink()
    with ThreadPoolExecutor(8) as pool:
        lines = list(pool.map(lambda _: Lock(tmp_path).take(), range(8)))
    assert lines.count(None) == 1
    assert [path.name for path in tmp_path.iterdir()] == [NAME]


def test_a_run_that_goes_on_elsewhere_is_not_touched(tmp_path, source):
    folder = tmp_path / "run"
    folder.mkdir()
    holder(folder, pid=os.getppid(), started=_started(os.getppid()))
    (folder / "metrics.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(UserError, match=f"in use since .* by process {os.getppid()} on "):
        drive([*TINY, *source, "--output-dir", str(folder)])
    assert (folder / "metrics.jsonl").read_text() == '{"step": 1}\n'
    assert sorted(path.name for path in folder.iterdir()) == ["metrics.jsonl", NAME]


def test_names_made_in_the_same_second_differ(tmp_path):
    base = tmp_path / "runs" / "tiny-20260101-000000"
    with ThreadPoolExecutor(8) as pool:
        folders = list(pool.map(lambda _: run_folder._make(base, False), range(8)))
    assert len(set(folders)) == 8 and all(folder.is_dir() for folder in folders)
    assert run_folder._make(base, True) == base  # a name that was given is what is used
