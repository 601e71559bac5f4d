"""Two real processes over gloo, one of which stops in its own way: how the job ends, when, and the line about it.

Run as a script, this file is one of their ranks.
"""

import os
import signal
import sys
import time
from pathlib import Path

import pytest

from ds_cmli.distributed import process_group as distributed
from ds_cmli.faults.diagnosis import EXIT_CODE
from ds_cmli.faults.watchdog import Watchdog
from tests.ranks import environments, start

TIMEOUT = 3.0  # seconds
SLACK = 8.0  # seconds; a loaded machine takes its time to end a process


def meet(fate: str, step: int, watchdog: Watchdog) -> None:
    if step == 5:
        print("FATE", time.time(), flush=True)
    match fate, step:
        case "sleeps", 5:
            time.sleep(30)
        case "is stopped", 5:
            os.kill(os.getpid(), signal.SIGSTOP)
        case "gets on", 0:  # compiles
            time.sleep(1.5 * TIMEOUT)
        case "gets on", 3:  # evaluates
            for _ in range(10):
                time.sleep(0.15 * TIMEOUT)
                watchdog.heartbeat()
        case "gets on", 6:  # saves
            with watchdog.slow():
                time.sleep(1.5 * TIMEOUT)


def train(fate: str, victim: int) -> None:
    """Ten steps, each of which ends in a collective; the victim meets its fate."""
    distributed.init()
    with Watchdog(TIMEOUT) as watchdog:
        for step in range(10):
            watchdog.heartbeat(step)
            time.sleep(0.1)
            if distributed.rank() == victim:
                meet(fate, step, watchdog)
            distributed.gather_objects(step)
    distributed.shutdown()
    print("finished", flush=True)


def two_ranks(folder: Path, fate: str, victim: int) -> tuple[list[int], str, float]:
    """Exit codes, all output, and the seconds from the fate to the end of the other rank."""
    environment = [env | {"SLURMD_NODENAME": f"node-{r}"} for r, env in enumerate(environments(2))]
    ranks = [start(["-m", __name__, fate, victim], env, folder / "log") for env in environment]
    ranks[1 - victim].wait(100)
    end = time.time()
    if fate == "is stopped":
        ranks[victim].kill()
    codes, text = [process.wait(100) for process in ranks], (folder / "log").read_text()
    return codes, text, end - float(text.split("FATE ")[1].split()[0])


HUNG, STOPPED, STORE = "no progress for 3 s, at test_watchdog.py:", "no progress for 3 s, dead or stopped", "its store"
STOPS = [("sleeps", 1, HUNG), *(pytest.param("is stopped", *row, marks=pytest.mark.slow)
                                for row in ((1, STOPPED), (0, STORE)))]  # fmt: skip


@pytest.mark.parametrize("fate, victim, words", STOPS)
def test_a_rank_without_progress_is_named_and_the_job_ends(tmp_path, fate, victim, words):
    codes, output, seconds = two_ranks(tmp_path, fate, victim)
    assert codes[1 - victim] == EXIT_CODE and codes[victim] in (EXIT_CODE, -9), output
    assert seconds < 2 * TIMEOUT + SLACK
    (printed,) = [line for line in output.splitlines() if line.startswith("error: ")]
    assert printed.startswith(f"error: rank {victim} on node node-{victim}: {words}"), output
    # A stopped rank publishes nothing more: what it had done may be a moment old.
    steps = (3, 4, 5) if fate == "is stopped" else (5,)
    assert printed.endswith(tuple(f"; last step {step}" for step in steps)), output


@pytest.mark.slow
def test_a_rank_that_compiles_evaluates_and_saves_is_left_alone(tmp_path):
    codes, output, _ = two_ranks(tmp_path, "gets on", 1)
    assert codes == [0, 0] and output.count("finished") == 2 and "error" not in output, output


if __name__ == "__main__":
    train(sys.argv[1], int(sys.argv[2]))
