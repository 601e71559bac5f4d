"""Data loading processes that are killed, or lack shared memory or open files: one line, soon, and a checkpoint."""

import errno
import gc
import multiprocessing.connection
import os
import resource
import signal
import subprocess
import sys
import time

import pytest
import torch

from ds_cmli.common.errors import UserError
from ds_cmli.data.loaders import Loader
from tests.conftest import ROOT, clean_environment
from tests.make import pairs


class Ones(torch.utils.data.Dataset):
    def __len__(self):
        return 1000

    def __getitem__(self, index):
        return torch.ones(100_000)


def loader() -> Loader:
    return Loader(Ones(), batch_size=4, num_workers=2)


def test_a_killed_process_is_told_at_the_next_batch_and_nowhere_else():
    others = torch.multiprocessing.active_children()  # of tests before this one
    batches = iter(loader())
    next(batches)
    victim = next(p for p in torch.multiprocessing.active_children() if p not in others)
    os.kill(victim.pid, signal.SIGKILL)
    time.sleep(0.5)  # here PyTorch's handler would raise
    started = time.monotonic()
    with pytest.raises(UserError, match=rf"a data loading process \(pid {victim.pid}\) has ended, killed by SIGKILL"):
        for _ in range(100):
            next(batches)
    assert time.monotonic() - started < 15


def test_a_batch_that_cannot_be_passed_on_is_told(capfd):
    class Passed(Ones):
        def __getitem__(self, index):
            return Fails() if index == 8 else torch.ones(3)

    batches = iter(Loader(Passed(), batch_size=None, num_workers=1))
    with pytest.raises(UserError, match=r"no shared memory for batches of --workers 1: /dev/shm has .* MB free"):
        for _ in range(100):
            next(batches)
    assert "Traceback" not in capfd.readouterr().err


def test_a_batch_whose_files_cannot_be_handed_over_is_told(capfd):
    def refuse(listener):
        raise OSError(errno.EMFILE, "Too many open files")

    def without_files(worker):
        multiprocessing.connection.Listener.accept = refuse

    batches = iter(Loader(Ones(), batch_size=4, num_workers=1, worker_init_fn=without_files))
    with pytest.raises(UserError, match=r"too many open files for --workers 1, ulimit -n is \d+: raise it"):
        next(batches)
    assert capfd.readouterr().err == ""


class Fails:
    """It fails where it is passed on, as a tensor does where /dev/shm is full."""

    def __reduce__(self):
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")


def test_the_limit_of_open_files_is_raised_as_far_as_allowed():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    few = max(map(int, os.listdir("/proc/self/fd"))) + 50  # the tests before this one have left files open
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (few, hard))
        next(iter(loader()))
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == min(hard, 65536)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.slow
@pytest.mark.parametrize("before, words", [
    ("ulimit -n 64", "too many open files for --workers 2, ulimit -n is 64: raise it"),
    ("mount -t tmpfs -o size=64k tmpfs /dev/shm", "no shared memory for batches of --workers 2: /dev/shm has 0.0 of"),
])  # fmt: skip
def test_a_training_ends_in_one_line(before, words, tmp_path):
    command = (
        f"{sys.executable} {ROOT}/ds_cmli/train.py --preset tiny --steps 50 --workers 2 --output-dir {tmp_path}/run"
    )
    command += f" --data {pairs(tmp_path / 'pairs', count=33)}"
    shell = ["bash", "-c", f"{before} || exit 99; {command}"]
    if "mount" in before:
        shell = ["unshare", "-m", *shell]
    done = subprocess.run(shell, env=clean_environment(), capture_output=True, text=True, timeout=240)
    if done.returncode in (1, 99) and "mount" in before:
        pytest.skip(f"cannot mount here: {done.stderr}")
    assert done.returncode == 2, done.stdout + done.stderr
    (expected,) = [line for line in done.stderr.splitlines() if line]
    assert expected.startswith(f"error: {words}")
    trained = "step 1/50" in done.stdout
    assert (tmp_path / "run" / "checkpoint" / "latest").is_file() == trained


def test_loaders_that_are_gone_leave_no_file_open():
    gc.collect()  # the loaders of the tests before this one
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        next(iter(Loader(Ones(), batch_size=4)))
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) <= before
