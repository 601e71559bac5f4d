"""TERM at random moments before step 1 of real starts: each ends within seconds, and can be started again."""

import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from tests.config.test_mistakes import pairs
from tests.conftest import ROOT, rank_environments

MOMENTS = 20
SECONDS = 5.0  # in which a start is to end
LOAD = 3.0  # factor for a machine that has other work


def start(folder: Path, ranks: int) -> list[subprocess.Popen]:
    command = [sys.executable, str(ROOT / "ds_cmli" / "train.py"), "--preset", "tiny", "--steps", "1"]
    command += ["--data", str(folder / "pairs"), "--output-dir", str(folder / "run")]
    processes = []
    for rank, env in enumerate(rank_environments(ranks)):
        with open(folder / f"{rank}.log", "w") as log:
            processes.append(subprocess.Popen(command, cwd=ROOT, env=env, stdout=log, stderr=subprocess.STDOUT))
    return processes


def logs(folder: Path) -> str:
    return "".join(path.read_text() for path in sorted(folder.glob("*.log")))


def seconds_to_step_1(folder: Path, ranks: int) -> float:
    pairs(folder / "pairs", count=64)
    began = time.monotonic()
    processes = start(folder, ranks)
    while not re.search("step 1/", logs(folder)):
        assert time.monotonic() - began < 600 and processes[0].poll() is None, logs(folder)
        time.sleep(0.05)
    took = time.monotonic() - began
    assert [process.wait(120) for process in processes] == [0] * ranks, logs(folder)
    return took


def ended_or_signalled(process: subprocess.Popen) -> int:
    """The exit code; what a rank leaves before they have met, its launcher would end."""
    try:
        return process.wait(20)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM)
        return process.wait(LOAD * SECONDS)


@pytest.mark.soak
@pytest.mark.parametrize("ranks", [1, 2])
def test_term_at_random_moments_before_step_1(ranks, tmp_path):
    draw = random.Random(ranks)
    (tmp_path / "first").mkdir()
    whole = seconds_to_step_1(tmp_path / "first", ranks)
    took, phases, codes = [], Counter(), Counter()
    for number in range(MOMENTS):
        folder = tmp_path / str(number)
        folder.mkdir()
        pairs(folder / "pairs", count=64)
        processes = start(folder, ranks)
        time.sleep(draw.uniform(0.05, 0.95) * whole)
        lines = (folder / "0.log").read_text().splitlines()
        # All ranks, as by a launcher; of two ranks every second time one alone.
        signalled = processes if number % 2 == 0 else [draw.choice(processes)]
        for process in signalled:
            process.send_signal(signal.SIGTERM)
        sent = time.monotonic()
        for process in signalled:
            process.wait(120)
        took.append(time.monotonic() - sent)
        ended = [ended_or_signalled(process) for process in processes]
        phases[lines[-1][:60] if lines else "nothing printed"] += 1
        codes[str(sorted(ended))] += 1
        assert "Traceback" not in logs(folder), logs(folder)
        if number % 5 == 0:
            again = start(folder, ranks)
            assert [process.wait(600) for process in again] == [0] * ranks, logs(folder)
    print(f"{MOMENTS} moments of {whole:.0f} s, {ranks} ranks: ended after {max(took):.1f} s at most")
    print(
        f"half of them after {sorted(took)[len(took) // 2]:.1f} s; exit codes {dict(codes)}; last lines {dict(phases)}"
    )
    assert max(took) < LOAD * SECONDS
    allowed = {"[85]", "[-15]", "[0]", "[85, 85]", "[-15, -15]", "[-15, 85]", "[0, 0]"}
    assert {*codes} <= allowed
