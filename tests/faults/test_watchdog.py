"""Two real processes over gloo, one of which stops in its own way: how the job ends, when, and the line about it."""

import subprocess
import time
from contextlib import suppress
from pathlib import Path

import pytest

from tests.ranks import environments, start

TIMEOUT = 3.0  # seconds
SLACK = 8.0  # seconds; a loaded machine takes its time to end a process
HUNG, STOPPED, STORE = "no progress for 3 s, at stopping_rank.py:", "no progress for 3 s, dead or stopped", "its store"


def two_ranks(folder: Path, fate: str, victim: int) -> tuple[list[int], str, float]:
    """Exit codes, all output, and the seconds from the fate to the end of the other rank."""
    command = ["tests/faults/stopping_rank.py", fate, TIMEOUT, victim]
    environment = [env | {"SLURMD_NODENAME": f"node-{r}"} for r, env in enumerate(environments(2))]
    ranks = [start(command, env, folder / "log") for env in environment]
    with suppress(subprocess.TimeoutExpired):
        ranks[1 - victim].wait(100)
    end = time.time()
    for number, process in enumerate(ranks):
        if process.returncode is None and (number != victim or fate == "is stopped"):
            process.kill()
    codes, text = [process.wait(30) for process in ranks], (folder / "log").read_text()
    return codes, text, end - float(text.split("FATE ")[1].split()[0])


STOPS = [("sleeps", 1, HUNG), *(pytest.param("is stopped", *row, marks=pytest.mark.slow)
                                for row in ((1, STOPPED), (0, STORE)))]  # fmt: skip


@pytest.mark.parametrize("fate, victim, words", STOPS)
def test_a_rank_without_progress_is_named_and_the_job_ends(tmp_path, fate, victim, words):
    codes, output, seconds = two_ranks(tmp_path, fate, victim)
    assert codes[1 - victim] == 1 and codes[victim] in (1, -9), output
    assert seconds < 2 * TIMEOUT + SLACK
    (printed,) = [line for line in output.splitlines() if line.startswith("error: ")]
    assert printed.startswith(f"error: rank {victim} on node node-{victim}: {words}"), output
    # A stopped rank publishes nothing more: what it had done may be a moment old.
    steps = (3, 4, 5) if fate == "is stopped" else (5,)
    assert printed.endswith(tuple(f"; last step {step}" for step in steps)), output


@pytest.mark.slow
@pytest.mark.parametrize("fate", ["compiles", "evaluates", "saves"])
def test_a_rank_that_gets_on_is_left_alone(tmp_path, fate):
    codes, output, _ = two_ranks(tmp_path, fate, 1)
    assert codes == [0, 0] and output.count("finished") == 2 and "error" not in output, output
