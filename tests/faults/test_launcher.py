"""Processes named like the launchers, which start a rank and are ended: the rank learns of it, from the start on."""

import json
import os
import shlex
import signal
import subprocess
import sys

import pytest

from tests.ranks import ROOT, clean_environment

RANK = """
import os, sys, time
time.sleep(float(os.environ["BEFORE"]))  # imports, before a rank takes any notice
from ds_cmli.faults import preemption
preemption.install()
print("ready", os.getpid(), flush=True)
end = time.monotonic() + float(os.environ.get("PATIENCE", 4))
while not preemption.requested() and time.monotonic() < end:
    time.sleep(0.02)
print("stopped by", preemption.requested(), flush=True)
"""
# A launcher starts its rank with variables that it has not itself; what is between them has them too.
STARTS = """
import json, os, subprocess, sys
given = json.loads(os.environ["GIVEN"]) if sys.argv[0].endswith(os.environ["LAUNCHER"]) else {}
child = subprocess.Popen([sys.executable, *sys.argv[1:]], env=os.environ | given)
print("launcher", flush=True)
child.wait()
"""
TORCHRUN, DEEPSPEED = {"TORCHELASTIC_RUN_ID": "none"}, {"CROSS_RANK": "0", "LOCAL_SIZE": "1"}
# launcher: what it gives a rank, and its programs from the one that the user starts on; which of them gives it
CHAINS = {
    "torchrun": (TORCHRUN, ["bin/torchrun"], 0),
    "torchrun around a script": (TORCHRUN, ["bin/torchrun", "wrapper"], 0),
    "deepspeed": (DEEPSPEED, ["bin/deepspeed", "deepspeed/launcher/launch.py"], 1),
    "deepspeed around a script": (DEEPSPEED, ["bin/deepspeed", "deepspeed/launcher/launch.py", "wrapper"], 1),
    "another": (TORCHRUN, ["mine.py"], 0),
    "another around a script": (TORCHRUN, ["mine.py", "wrapper"], 0),
    "none": ({}, [], 0),
}


def prepared(folder, name: str, before: float) -> tuple[list[str], dict[str, str]]:
    """The command that starts a chain, and its environment."""
    given, programs, giver = CHAINS[name]
    for program in programs:
        (folder / program).parent.mkdir(parents=True, exist_ok=True)
        (folder / program).write_text(STARTS)
    folder.mkdir(exist_ok=True)
    (folder / "rank.py").write_text(RANK)
    command = [sys.executable, *(str(folder / program) for program in programs), str(folder / "rank.py")]
    env = clean_environment() | {"BEFORE": str(before), "PYTHONPATH": str(ROOT), "GIVEN": json.dumps(given)}
    return command, env | {"LAUNCHER": [*programs, "none"][giver]}


def start(folder, name: str, before: float = 0) -> subprocess.Popen:
    command, env = prepared(folder, name, before)
    env["PATIENCE"] = "30"  # seconds; the machine may be busy
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


def test_the_end_of_the_shell_that_started_it_is_none(tmp_path):
    # As with `nohup deepspeed ... &`: the command's own parent ends, and the command lives on. The rank looks for its
    # launcher after that; or before, in two cases.
    shells = {}
    for name, before in [("deepspeed", 0), ("none", 0), *((name, 1) for name in CHAINS)]:
        command, env = prepared(tmp_path / f"{name}-{before}", name, before)
        script = f"{shlex.join(command)} & sleep {0 if before else 1}"
        shells[name, before] = subprocess.Popen(["bash", "-c", script], env=env, stdout=subprocess.PIPE, text=True)
    stopped = {case: shell.communicate()[0].splitlines()[-1] for case, shell in shells.items()}
    assert stopped == dict.fromkeys(shells, "stopped by None")


@pytest.mark.parametrize("before, said", [((), "SIGHUP"), (("nohup",), "None")])
def test_hang_up_is_taken_unless_nohup_has_it_ignored(tmp_path, before, said):
    (tmp_path / "rank.py").write_text(RANK)
    env = clean_environment() | {"BEFORE": "0", "PYTHONPATH": str(ROOT)}
    command = [*before, sys.executable, str(tmp_path / "rank.py")]
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    os.kill(int(process.stdout.readline().split()[1]), signal.SIGHUP)
    assert process.stdout.read() == f"stopped by {said}\n"
    process.wait()
