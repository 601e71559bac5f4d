"""Two real processes over gloo, one of which stops in its own way: how the job ends, when, and the line about it."""

import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

from tests.ranks import environments, start

TIMEOUT = 3.0  # seconds
SLACK = 8.0  # seconds; a loaded machine takes its time to end a process
# fate, rank: what the line says of the rank
LINES = {
    ("sleeps", 1): "no progress for 3 s, at stopping_rank.py:",
    ("is stopped", 1): "no progress for 3 s, dead or stopped",
    ("is stopped", 0): "its store does not answer",
}
GOES_ON = (("evaluates", 1), ("saves", 1), ("pauses", 1), ("compiles", 1))


def two_ranks(folder: Path, fate: str, victim: int) -> tuple[list[int], str, float]:
    """Exit codes, all output, and the seconds from the fate to the end of the other rank."""
    log = folder / f"{fate}-{victim}"
    command = ["tests/faults/stopping_rank.py", fate, TIMEOUT, victim]
    ranks = [start(command, env | {"SLURMD_NODENAME": f"node-{r}"}, log) for r, env in enumerate(environments(2))]
    with suppress(subprocess.TimeoutExpired):
        ranks[1 - victim].wait(100)
    end = time.time()
    for number, process in enumerate(ranks):
        if process.returncode is None and (number != victim or fate == "is stopped"):
            process.kill()
    codes, text = [process.wait(30) for process in ranks], log.read_text()
    return codes, text, end - float(text.split("FATE ")[1].split()[0])


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory, request):
    """The cases of the tests that run, some at a time: they mostly wait."""
    params = [item.callspec.params for item in request.session.items if "outcomes" in getattr(item, "fixturenames", ())]
    cases, folder = list(dict.fromkeys(of["case"] for of in params)), tmp_path_factory.mktemp("ranks")
    with ThreadPoolExecutor(4) as pool:
        return dict(zip(cases, pool.map(lambda case: two_ranks(folder, *case), cases), strict=True))


@pytest.mark.parametrize("case", [case if case == ("sleeps", 1) else pytest.param(case, marks=pytest.mark.slow)
                                  for case in LINES])  # fmt: skip
def test_a_rank_without_progress_is_named_and_the_job_ends(outcomes, case):
    codes, output, seconds = outcomes[case]
    printed = [line for line in output.splitlines() if line.startswith("error: ")]
    print(f"rank {case[1]} {case[0]}: exit codes {codes}, {seconds:.1f} s", *printed, sep="\n")
    assert codes[1 - case[1]] == 1 and codes[case[1]] in (1, -9), output
    assert seconds < 2 * TIMEOUT + SLACK
    assert len(printed) == 1, output
    assert printed[0].startswith(f"error: rank {case[1]} on node node-{case[1]}: {LINES[case]}"), output
    # A stopped rank publishes nothing more: what it had done may be a moment old.
    steps = (3, 4, 5) if case[0] == "is stopped" else (5,)
    assert printed[0].endswith(tuple(f"; last step {step}" for step in steps)), output


@pytest.mark.slow
@pytest.mark.parametrize("case", GOES_ON)
def test_a_rank_that_gets_on_is_left_alone(outcomes, case):
    codes, output, _ = outcomes[case]
    assert codes == [0, 0] and output.count("finished") == 2 and "error" not in output, output
