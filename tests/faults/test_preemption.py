"""Signals to real processes: a flag alone, a checkpoint by all ranks together, exit code 85, and the run goes on."""

import os
import re
import signal
import subprocess
import sys
import time

import psutil
import pytest

from ds_cmli.faults import preemption
from tests.checkpoint.runs import assert_same
from tests.make import small, train
from tests.ranks import ROOT, clean_environment, launcher, start, training_ranks, wait_for

WAITS = """
import time
from ds_cmli.faults import preemption
with preemption.handle_signals():
    print("ready", flush=True)
    end = time.monotonic() + 30
    while not preemption.end_request() and time.monotonic() < end:
        time.sleep(0.01)
    print(preemption.end_request(), flush=True)
"""
# It stands between a launcher and its rank, starts the command behind it, and waits.
STARTS = "import subprocess, sys; print('up', flush=True); sys.exit(subprocess.call(sys.argv[1:]))"
LONG = ["--preset", "tiny", "--steps", "100000", "--log-every", "5"]


@pytest.mark.parametrize("number", preemption.SIGNALS, ids=lambda number: number.name)
def test_each_signal_sets_the_flag_until_the_end(number):
    with preemption.handle_signals():
        signal.raise_signal(number)
        assert preemption.end_request() == number.name
    assert preemption.end_request() is None


def test_a_second_int_interrupts_and_hang_up_stays_ignored_under_nohup(monkeypatch):
    monkeypatch.setattr(preemption, "SAME_PRESS", 0.2)
    handler = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with preemption.handle_signals():
            signal.raise_signal(signal.SIGHUP)
            assert preemption.end_request() is None
            for _ in range(2):  # the same Ctrl-C, passed on by a launcher
                signal.raise_signal(signal.SIGINT)
            time.sleep(0.3)
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGHUP, handler)


@pytest.mark.parametrize("env", [{"TORCHELASTIC_RUN_ID": "x"}, {"CROSS_RANK": "0"}, {}], ids=str)
def test_a_rank_learns_of_its_launchers_end(env):
    """`torchrun` is its parent, `deepspeed` the parent of its parent; without them nobody's end counts."""
    generations = 2 if "CROSS_RANK" in env else 1
    launcher = subprocess.Popen(
        [*(sys.executable, "-c", STARTS) * generations, sys.executable, "-c", WAITS],
        cwd=ROOT, env=clean_environment() | env, stdout=subprocess.PIPE, text=True, process_group=0,
    )  # fmt: skip
    while launcher.stdout.readline() != "ready\n":
        assert launcher.poll() is None, f"it has ended with {launcher.returncode}"
    launcher.kill()
    if env:
        assert launcher.stdout.readline() == "the end of its launcher\n"
        return
    time.sleep(3 * preemption.INTERVAL)
    os.killpg(launcher.pid, signal.SIGUSR1)
    assert launcher.stdout.readline() == "SIGUSR1\n"


def test_a_signal_to_one_rank_ends_all_with_a_checkpoint(tmp_path, source):
    log = tmp_path / "log"
    with training_ranks([*LONG, *source, "--output-dir", tmp_path / "run"], log) as processes:
        os.kill(processes[1].pid, signal.SIGTERM)
        for process in processes:
            process.join(120)
            assert process.exitcode == preemption.EXIT_CODE, log.read_text()
    stopped = re.search(r"stopped at step (\d+) of 100000 by a signal to another rank", log.read_text())
    assert stopped, log.read_text()
    assert (tmp_path / "run" / "checkpoint" / "latest").read_text() == f"step{stopped[1]}"
    assert "Traceback" not in log.read_text()


@pytest.mark.slow
def test_ctrl_c_on_the_deepspeed_command_saves(tmp_path, source):
    log = tmp_path / "log"
    command = [*launcher("deepspeed", 2), str(ROOT / "ds_cmli" / "train.py"), *LONG]
    command += [*source, "--workers", "1", "--output-dir", str(tmp_path / "run")]
    with log.open("w") as out:
        process = subprocess.Popen(command, cwd=ROOT, env=clean_environment(), stdout=out,
                                   stderr=subprocess.STDOUT, start_new_session=True)  # fmt: skip
    try:
        wait_for(lambda: "step 5/" in log.read_text(), process, log)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the launcher, the ranks and their loaders
        process.wait(60)
    finally:
        process.kill()
    stopped = re.compile("stopped at step .* by SIGINT")
    wait_for(lambda: stopped.search(log.read_text()), subprocess.Popen(["sleep", "60"]), log)
    assert (tmp_path / "run" / "checkpoint" / "latest").is_file()


@pytest.mark.slow
def test_torchrun_restarts_a_run_whose_rank_was_killed_and_its_end_is_that_of_an_unbroken_one(tmp_path, source):
    log = tmp_path / "log"
    run = tmp_path / "run"
    unbroken = tmp_path / "unbroken"
    options = {"--steps": 10, "--log-every": 1, "--save-every": 2}
    command = [*launcher("torchrun", 2), "--max-restarts=1", "--monitor-interval=0.1", "--shutdown-timeout=5"]
    command += [str(ROOT / "ds_cmli" / "train.py"), *small({**options, "--output-dir": run}), *source]
    env = clean_environment() | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "DS_CMLI_JOB": "a job"}
    process = start(command, env, log)
    wait_for((run / "checkpoint" / "latest").is_file, process, log)
    ranks = {child.environ().get("RANK"): child for child in psutil.Process(process.pid).children()}
    ranks["1"].kill()
    assert process.wait(300) == 0, log.read_text()
    (step,) = re.findall(r"resuming from \S+step(\d+)\n", log.read_text())
    assert 0 < int(step) < 10
    assert train(*small({**options, "--output-dir": unbroken}), *source, world=2) == 0
    assert_same(run, unbroken)
