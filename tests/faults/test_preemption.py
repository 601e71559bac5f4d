"""Signals to real processes: a flag alone, a checkpoint by all ranks together, exit code 85, and the run goes on."""

import os
import re
import signal
import subprocess
import sys
import time

import pytest

from ds_cmli.faults import preemption
from tests.make import pairs
from tests.ranks import ROOT, clean_environment, free_port, start_ranks, wait_for

WAITS = """
import sys, time
from ds_cmli.faults import preemption
preemption.install()
print("ready", flush=True)
while not preemption.requested():
    time.sleep(0.01)
print(preemption.requested(), flush=True)
sys.exit(preemption.EXIT_CODE)
"""
# The main thread sits in C code, as in a collective: Python's own handlers cannot run.
STUCK = """
import hashlib
from ds_cmli.faults import preemption
preemption.install()
print("ready", flush=True)
hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)
"""


def start(code: str) -> subprocess.Popen:
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("number", preemption.SIGNALS, ids=lambda number: signal.Signals(number).name)
def test_each_signal_sets_the_flag(number):
    process = start(WAITS)
    process.send_signal(number)
    assert process.communicate(timeout=30)[0] == f"{signal.Signals(number).name}\n"
    assert process.returncode == 85


def test_a_second_int_stops_at_once_even_while_ranks_wait_for_each_other():
    process = start(STUCK)
    try:
        process.send_signal(signal.SIGINT)
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)  # the same Ctrl-C, passed on by a launcher
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(preemption.SAME_PRESS + 0.3)
        started = time.monotonic()
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 128 + signal.SIGINT
        print(f"ended {time.monotonic() - started:.3f} s after the second INT")
    finally:
        process.kill()


def test_a_start_that_waits_in_c_code_ends_within_five_seconds():
    for number in (signal.SIGTERM, signal.SIGUSR1):
        process = start(STUCK)
        started = time.monotonic()
        process.send_signal(number)
        output = process.communicate(timeout=60)[0]
        assert process.returncode == 85
        assert output == f"stopped before step 1 by {signal.Signals(number).name}: start again to go on\n"
        print(f"ended {time.monotonic() - started:.3f} s after {signal.Signals(number).name}")
        assert time.monotonic() - started < 20  # on a machine with nothing else to do: 3 s


LONG = ["--preset", "tiny", "--steps", "100000", "--log-every", "5"]


def test_a_signal_to_one_rank_ends_all_with_a_checkpoint(tmp_path):
    arguments = [*LONG, "--data", pairs(tmp_path / "pairs", count=63), "--output-dir", str(tmp_path / "run")]
    logs = [tmp_path / f"{rank}.log" for rank in range(2)]
    processes = start_ranks(["ds_cmli/train.py", *arguments], logs)
    try:
        wait_for(lambda: "step 5/" in logs[0].read_text(), processes[0], logs[0])
        started = time.monotonic()
        processes[1].send_signal(signal.SIGUSR2)
        assert [process.wait(120) for process in processes] == [85, 85], logs[0].read_text()
        print(f"both ranks ended {time.monotonic() - started:.2f} s after the signal")
    finally:
        for process in processes:
            process.kill()
    stopped = re.search(r"stopped at step (\d+) of 100000 by a signal to another rank", logs[0].read_text())
    assert stopped, logs[0].read_text()
    assert (tmp_path / "run" / "checkpoint" / "latest").read_text() == f"step{stopped[1]}"
    assert "Traceback" not in logs[0].read_text() + logs[1].read_text()


@pytest.mark.slow
def test_ctrl_c_on_the_deepspeed_command_saves(tmp_path):
    log = tmp_path / "log"
    launcher = [os.path.join(os.path.dirname(sys.executable), "deepspeed"), "--num_accelerators", "1"]
    command = [*launcher, "--master_port", str(free_port()), str(ROOT / "ds_cmli" / "train.py"), *LONG]
    command += ["--data", pairs(tmp_path / "pairs", count=63), "--workers", "1", "--output-dir", str(tmp_path / "run")]
    with log.open("w") as out:
        process = subprocess.Popen(command, cwd=ROOT, env=clean_environment(), stdout=out,
                                   stderr=subprocess.STDOUT, start_new_session=True)  # fmt: skip
    try:
        wait_for(lambda: "step 5/" in log.read_text(), process, log)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the launcher, the rank and its loader
        process.wait(60)
    finally:
        process.kill()
    stopped = re.compile("stopped at step .* by SIGINT")
    wait_for(lambda: stopped.search(log.read_text()), subprocess.Popen(["sleep", "60"]), log)
    assert (tmp_path / "run" / "checkpoint" / "latest").is_file()
