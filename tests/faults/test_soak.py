"""Two ranks of tiny steps, signalled again and again: no step is lost or done twice, and memory stays flat.

The short form runs with the other tests, the long one by `pytest -m soak`.
"""

import json
import random
import re
import signal
import time
from pathlib import Path

import pytest

from tests.config.test_mistakes import pairs
from tests.conftest import ROOT, rank_environments
from tests.processes import Program

WARM = 0.4  # share of a start's training time in which its memory settles: the allocator's pools fill for some 15 s


def start(folder: Path) -> list[Program]:
    command = [str(ROOT / "ds_cmli" / "train.py"), "--preset", "tiny", "--steps", "1000000"]
    # Captions of one length: for each new shape of a batch the libraries keep some more memory, which is no leak.
    command += ["--save-minutes", "0", "--data", str(folder / "pairs"), "--output-dir", str(folder / "run")]
    return [Program(command, env, ROOT, folder / f"rank{rank}.log") for rank, env in enumerate(rank_environments(2))]


def resident(process: Program) -> float:
    """MB"""
    status = Path(f"/proc/{process.pid}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1024


def steps(folder: Path) -> list[int]:
    file = folder / "run" / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return [json.loads(line)["step"] for line in lines if line.endswith("}") and '"loss"' in line]


def one_start(folder: Path, seconds: float) -> list[list[float]]:
    """Train for `seconds`, signal one rank, and see both end with 85; each rank's memory in MB, as it trained."""
    before = len(steps(folder))
    ranks = start(folder)
    memory: list[list[float]] = [[], []]
    try:
        limit = time.monotonic() + 120
        while len(steps(folder)) <= before:
            assert time.monotonic() < limit and all(r.poll() is None for r in ranks), logs(folder)
            time.sleep(0.1)
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            time.sleep(min(0.5, seconds / 20))
            for rank, process in enumerate(ranks):
                memory[rank].append(resident(process))
        random.choice(ranks).send_signal(random.choice([signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2]))
        assert [r.wait(60) for r in ranks] == [85, 85], logs(folder)
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    return memory


def logs(folder: Path) -> str:
    return "\n".join((folder / f"rank{rank}.log").read_text()[-3000:] for rank in range(2))


def soak(folder: Path, starts: int, seconds: float, growth: float) -> None:
    """`growth`: MB that a process may grow once it has settled, and that one start may end above the first."""
    pairs(folder / "pairs", count=64)
    ends: list[list[float]] = [[], []]
    for _ in range(starts):
        for rank, memory in enumerate(one_start(folder, seconds)):
            settled = memory[int(WARM * len(memory)) :]
            ends[rank].append(settled[-1])
            assert settled[-1] - settled[0] < growth, f"rank {rank} grew: {memory}"
    done = steps(folder)
    figures = [[f"{value:.0f}" for value in rank[:: max(1, starts // 8)]] for rank in ends]
    print(f"{starts} starts, {len(done)} steps; MB at each end: {figures}")
    assert done == list(range(1, len(done) + 1))  # none lost, none twice, over all starts
    assert len(done) >= 5 * starts
    for rank in ends:
        assert max(rank) - rank[0] < growth, rank
    assert "Traceback" not in logs(folder)


@pytest.mark.slow
def test_signals_lose_no_step_short(tmp_path):
    soak(tmp_path, starts=2, seconds=5, growth=50)


@pytest.mark.soak
def test_signals_lose_no_step_in_half_an_hour(tmp_path):
    # A start takes some seconds more, which makes a minute.
    soak(tmp_path, starts=30, seconds=53, growth=8)
