"""Real ranks over gloo, one of which holds the others up: how the job ends, when, and the line about it."""

import itertools
import os
import re
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader

from ds_cmli.distributed import process_group as distributed
from ds_cmli.faults import watchdog
from ds_cmli.faults.diagnosis import FAULT_EXIT_CODE, GRACE, RankRecord, RankState, diagnose
from ds_cmli.faults.watchdog import Watchdog
from tests.ranks import start_function, training_ranks

TIMEOUT = 3.0  # seconds
SLACK = 12.0  # seconds; a loaded machine takes its time to end a process
STUCK = f"no progress for {TIMEOUT:g} s, at test_watchdog.py:"
STOPPED = f"no progress for {TIMEOUT:g} s, dead or stopped"
KILLED = f"no progress for {TIMEOUT / 2:g} s, dead or stopped"
STATE = RankState("node-7", step=5, heartbeats=10, collectives=30, place="A")
WAITS = STATE._replace(waits=True, place="B")
NO_ONE = "all ranks: no progress for 5 s, at B; last step 5"
ALL = -1  # in place of the victim: all ranks meet their fate


class SlowItem(list):
    def __getitem__(self, index: int) -> None:
        time.sleep(60)


def wait_and_be_killed() -> None:
    time.sleep(0.5)  # the others wait in the collective by now
    os.kill(os.getpid(), signal.SIGKILL)


HOLD_UP = {
    "sleeps": lambda: time.sleep(60),
    "others sync": lambda: time.sleep(60),
    "is stopped": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "is killed": wait_and_be_killed,
    "loops": lambda: [None for _ in itertools.repeat(None)],
    "loads": lambda: next(iter(DataLoader(SlowItem([0]), num_workers=1))),
    "waits elsewhere": lambda: dist.recv(torch.ones(1), 0),
}


def get_on(step: int, watchdog: Watchdog) -> None:
    """Compile in the first step, evaluate in the fourth, save in the seventh; longer than the time limit."""
    with watchdog.slow() if step == 6 else nullcontext():
        for _ in range({0: 10, 3: 10, 6: 10}.get(step, 0)):
            time.sleep(0.15 * TIMEOUT)
            if step == 3:
                watchdog.heartbeat()


def train(rank: int, fate: str, victim: int) -> None:
    """Take ten steps, each of which ends in a collective; the victim meets its fate in the sixth."""
    distributed.init()
    with Watchdog(TIMEOUT) as watchdog:
        for step in range(10):
            watchdog.heartbeat(step)
            time.sleep(0.1)
            if fate == "gets on" and rank == victim:
                get_on(step, watchdog)
            elif step == 5 and victim in (rank, ALL):
                print("FATE", time.time(), flush=True)
                dist.recv(torch.ones(1), 1 - rank) if victim == ALL else HOLD_UP[fate]()
            if fate == "others sync":  # in no file of torch.distributed, as in a CPU-GPU sync
                dist.all_reduce(torch.ones(1), async_op=True).wait()
            else:
                dist.all_reduce(torch.ones(1))
    distributed.shutdown()
    print("finished", flush=True)


class Job:
    """Ranks that train, one of which meets its fate."""

    def __init__(self, log: Path, fate: str, victim: int, world: int):
        self.log = log
        self.victim = victim
        self.has_stopped = fate == "is stopped"  # the victim, for good
        self.ranks = start_function(train, world, log, fate, victim, SLURMD_NODENAME="node-7")

    def end(self) -> tuple[list[int | None], list[str], float]:
        """Return the exit codes, the lines of output, and the seconds from the fate to the end of another rank."""
        self.ranks[0 if self.victim else 1].join(100)
        end = time.time()
        for rank in self.ranks:
            rank.join(0 if self.has_stopped else SLACK)
            rank.kill()
            rank.join()
        text = self.log.read_text()
        *_, fate_at = re.findall(r"FATE ([\d.]+)", text) or [end]
        return [rank.exitcode for rank in self.ranks], text.splitlines(), end - float(fate_at)


CASES = {
    ("loops", 1, 2): STUCK,
    ("loops", 0, 2): STUCK,
    ("loads", 1, 2): STUCK,
    ("others sync", 1, 2): STUCK,
    ("waits elsewhere", 1, 3): STUCK,
    ("is stopped", 1, 2): STOPPED,
    ("is stopped", 0, 2): "its store does not answer",
    ("is killed", 1, 2): KILLED,
    ("is killed", 0, 2): "its process has ended",
    ("all wait", ALL, 2): STUCK,
}


@pytest.fixture(scope="module")
def ends(tmp_path_factory) -> dict[tuple[str, int, int], tuple[list[int | None], list[str], float]]:
    """The end of each case's job. All run at once, because they mostly wait."""
    folder = tmp_path_factory.mktemp("jobs")
    jobs = [Job(folder / str(number), *case) for number, case in enumerate(CASES)]
    with ThreadPoolExecutor(len(jobs)) as pool:
        return dict(zip(CASES, pool.map(Job.end, jobs), strict=True))


def assert_one_error(lines: list[str], beginning: str) -> str:
    (error,) = [line for line in lines if line.startswith("error: ")]
    assert error.startswith(f"error: {beginning}"), "\n".join(lines)
    assert not [line for line in lines if "Traceback" in line], "\n".join(lines)
    return error


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_rank_at_fault_is_named_and_the_job_ends(ends, case):
    codes, lines, seconds = ends[case]
    fate, victim, _ = case
    if victim != ALL:
        assert codes.pop(victim) in (FAULT_EXIT_CODE, -signal.SIGKILL), lines
    assert {*codes} == {FAULT_EXIT_CODE}, lines
    assert seconds < 2 * TIMEOUT + SLACK
    subject = "all ranks" if victim == ALL else f"rank {victim} on node node-7"
    error = assert_one_error(lines, f"{subject}: {CASES[case]}")
    # A rank that is gone publishes nothing more: what it had done is a moment old, on a loaded machine some seconds.
    steps = range(6) if fate in ("is stopped", "is killed") else (5,)
    assert error.endswith(tuple(f"; last step {step}" for step in steps))


@pytest.mark.slow
def test_a_rank_that_compiles_evaluates_and_saves_is_left_alone(tmp_path):
    codes, lines, _ = Job(tmp_path / "log", "gets on", 1, 2).end()
    assert codes == [0, 0] and lines.count("finished") == 2 and not [line for line in lines if "error" in line]


def named(*states: RankState, seconds: int = 10) -> str | None:
    """Return the line about ranks that stay in these states, with a time limit of 5 s."""
    records = [RankRecord() for _ in states]
    for turn in range(seconds + 1):
        for record, state in zip(records, states, strict=True):
            record.update(turn, state, 1.0)
    fault = diagnose(records, 5.0)
    return None if fault is None else fault.line


def line_about(rank: int, where: str) -> str:
    return f"rank {rank} on node node-7: no progress for 5 s, at {where}; last step 5"


@pytest.mark.parametrize(
    "states, line",
    [
        ([STATE], line_about(0, "A")),
        ([WAITS, STATE, WAITS], line_about(1, "A")),
        ([WAITS, STATE._replace(heartbeats=11)], line_about(1, "A")),
        ([WAITS, STATE, STATE, WAITS], line_about(1, "A")),
        # All but one are in a CPU-GPU sync, behind a collective that this one has not entered.
        ([STATE, STATE._replace(collectives=29, place="C"), STATE], line_about(1, "C")),
        # One has missed a collective, and has gone on.
        ([WAITS, WAITS._replace(place="C"), WAITS], line_about(1, "C, while others are at B")),
        ([STATE, STATE, WAITS._replace(collectives=29)], line_about(2, "B, while others are at A")),
        ([WAITS, WAITS], NO_ONE),
        ([WAITS, WAITS._replace(place="C")], NO_ONE),
        ([STATE._replace(is_slow=True), WAITS], None),
    ],
)
def test_who_is_at_fault_follows_from_what_ranks_have_published(states, line):
    assert named(*states) == line
    assert named(*states, seconds=5) is None


def test_a_slow_rank_has_ten_times_as_long():
    assert named(STATE._replace(is_slow=True), WAITS, seconds=50) is None
    assert named(STATE._replace(is_slow=True), WAITS, seconds=51) is not None
    for silent, is_dead in ((50.0, False), (51.0, True)):
        record = RankRecord(STATE._replace(is_slow=True), turn=0, seconds_silent=silent)
        assert (diagnose([record], 5.0) is not None) == is_dead, f"silent for {silent} s"


@pytest.mark.parametrize("code, line", [(1, "rank 1 on node node-7: has ended by an error; last step 5"), (2, "")])
def test_an_error_of_one_rank_ends_the_others_with_its_exit_code(code, line):
    """Their collective does not fail, as over NCCL. A mistake is printed by the rank that has it."""
    records = [RankRecord(), RankRecord()]
    for turn in range(20):
        records[0].update(turn, WAITS, 1.0)
        records[1].update(0, STATE._replace(error="an error", exit_code=code), 1.0)
        fault = diagnose(records, 120.0)
        assert (fault is None) == (turn <= GRACE), "they may meet the same error"
    assert fault == (line, code)


def test_the_line_is_the_packages_also_where_it_is_installed(monkeypatch):
    package = "/env/lib/python3.12/site-packages/ds_cmli/"
    monkeypatch.setattr(watchdog, "PACKAGE", package)
    names: dict = {"sys": sys}
    exec(compile("def step(): return library(lambda: sys._getframe())", package + "run.py", "exec"), names)
    exec(compile("def library(f): return f()", "/env/lib/python3.12/site-packages/torch/x.py", "exec"), names)
    assert watchdog._position(names["step"]()) == (False, "run.py:1 <lambda>")


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_training_whose_rank_is_killed_ends_with_one_line(tmp_path, source, victim):
    options = ["--preset", "tiny", "--steps", "100000", "--log-every", "1", *source]
    log = tmp_path / "log"
    with training_ranks([*options, "--output-dir", tmp_path / "run"], log) as processes:
        processes[victim].kill()
        processes[1 - victim].join(60)
        assert processes[1 - victim].exitcode == FAULT_EXIT_CODE
    lines = log.read_text().splitlines()
    assert_one_error(lines, f"rank {victim} on node ")
    assert not [line for line in lines if "peer" in line or "Exception" in line]
