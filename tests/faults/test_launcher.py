"""Processes named like the launchers, which start a rank and are ended: the rank learns of it, from the start on."""

import os
import signal
import subprocess
import sys

import pytest

from tests.conftest import ROOT, clean_environment

RANK = """
import os, sys, time
time.sleep(float(os.environ["BEFORE"]))  # imports, before a rank takes any notice
from ds_cmli.faults import preemption
preemption.install()
print("ready", os.getpid(), flush=True)
end = time.monotonic() + 4
while not preemption.requested() and time.monotonic() < end:
    time.sleep(0.02)
print("stopped by", preemption.requested(), flush=True)
"""
STARTS = """
import subprocess, sys
child = subprocess.Popen([sys.executable, *sys.argv[1:]])
print("launcher", flush=True)
child.wait()
"""
TORCHRUN, DEEPSPEED = {"TORCHELASTIC_RUN_ID": "none"}, {"CROSS_RANK": "0", "LOCAL_SIZE": "1"}
# launcher: its environment, and its programs from the one that the user starts on
CHAINS = {
    "torchrun": (TORCHRUN, ["bin/torchrun"]),
    "torchrun around a script": (TORCHRUN, ["bin/torchrun", "wrapper"]),
    "deepspeed": (DEEPSPEED, ["bin/deepspeed", "deepspeed/launcher/launch.py"]),
    "another": (TORCHRUN, ["mine.py"]),
    "none": ({}, []),
}


def start(folder, name: str, before: float = 0) -> subprocess.Popen:
    env, programs = CHAINS[name]
    for program in programs:
        (folder / program).parent.mkdir(parents=True, exist_ok=True)
        (folder / program).write_text(STARTS)
    (folder / "rank.py").write_text(RANK)
    command = [sys.executable, *(str(folder / program) for program in programs), str(folder / "rank.py")]
    env = clean_environment() | env | {"BEFORE": str(before), "PYTHONPATH": str(ROOT)}
    # A group of its own, as an interactive shell gives it.
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True, process_group=0)


@pytest.mark.parametrize("name", [name for name in CHAINS if name != "none"])
def test_a_rank_learns_of_its_launchers_end(tmp_path, name):
    process = start(tmp_path, name)
    while not process.stdout.readline().startswith("ready "):
        pass
    process.kill()
    assert process.stdout.read() == "stopped by the end of its launcher\n"  # of the rank: the launcher is dead
    process.wait()


@pytest.mark.parametrize("name", ["torchrun", "deepspeed"])
def test_a_launcher_that_ends_before_the_rank_looks_is_missed_too(tmp_path, name):
    process = start(tmp_path, name, before=1)
    for _ in CHAINS[name][1]:
        process.stdout.readline()
    process.kill()
    assert process.stdout.read().endswith("stopped by the end of its launcher\n")
    process.wait()


@pytest.mark.parametrize("name", ["deepspeed", "none"])
def test_the_end_of_the_shell_that_started_it_is_none(tmp_path, name):
    # As with `nohup deepspeed ... &`: the command's own parent ends, and the command lives on.
    start(tmp_path, name).kill()  # writes the programs
    env, programs = CHAINS[name]
    command = " ".join([sys.executable, *(f"{tmp_path}/{program}" for program in programs), f"{tmp_path}/rank.py"])
    env = clean_environment() | env | {"BEFORE": "0", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(["bash", "-c", f"{command} & sleep 1"], env=env, stdout=subprocess.PIPE, text=True)
    assert done.stdout.endswith("stopped by None\n")


@pytest.mark.parametrize("before, said", [((), "SIGHUP"), (("nohup",), "None")])
def test_hang_up_is_taken_unless_nohup_has_it_ignored(tmp_path, before, said):
    (tmp_path / "rank.py").write_text(RANK)
    env = clean_environment() | {"BEFORE": "0", "PYTHONPATH": str(ROOT)}
    command = [*before, sys.executable, str(tmp_path / "rank.py")]
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    os.kill(int(process.stdout.readline().split()[1]), signal.SIGHUP)
    assert process.stdout.read() == f"stopped by {said}\n"
    process.wait()
