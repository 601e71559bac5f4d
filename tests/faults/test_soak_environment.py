"""Faults of a run's surroundings at random moments, `pytest -m soak`: each run loses nothing, and tells its user."""

import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from tests.config.test_mistakes import pairs
from tests.conftest import ROOT, rank_environments

STEPS = 30
LIMIT = 120  # seconds, several times what such a run takes
WORDS = ("traceback", "hung", "silent", "told")


def command(folder: Path, *more: str) -> list[str]:
    return [sys.executable, str(ROOT / "ds_cmli" / "train.py"), "--preset", "tiny", "--steps", str(STEPS),
            "--data", str(folder / "pairs"), "--output-dir", str(folder / "run"), "--save-every", "5",
            "--set", "run.match_maps=0", "--set", "run.watchdog=20", *more]  # fmt: skip


def start(folder: Path, ranks: int, before: str = "true", after: str = "", workers: int = 0) -> list:
    line = " ".join(command(folder, "--workers", str(workers)))
    processes = []
    for rank, env in enumerate(rank_environments(ranks)):
        with (folder / f"{rank}.log").open("w") as log:
            shell = ["unshare", "-m", "--propagation", "slave", "bash", "-c", f"{before}; exec {line} {after}"]
            processes.append(subprocess.Popen(shell, env=env, cwd=ROOT, stdout=log, stderr=log))
    return processes


def output(folder: Path) -> str:
    return "".join(path.read_text(errors="replace") for path in folder.glob("?.log"))


def rename(run: Path, ranks: list) -> None:
    run.rename(run.with_name("renamed"))


def remove(run: Path, ranks: list) -> None:
    shutil.rmtree(run)


def unlink_metrics(run: Path, ranks: list) -> None:
    (run / "metrics.jsonl").unlink()


def cut_metrics(run: Path, ranks: list) -> None:
    with (run / "metrics.jsonl").open("r+b") as file:
        file.truncate(50)


def remove_checkpoints(run: Path, ranks: list) -> None:
    shutil.rmtree(run / "checkpoint", ignore_errors=True)  # a save may be adding to it


def checkpoints_a_file(run: Path, ranks: list) -> None:
    (run / "checkpoint").rename(run / "away")
    (run / "checkpoint").write_text("")


def kill_a_worker(run: Path, ranks: list) -> None:
    listed = subprocess.run(["pgrep", "-P", str(ranks[-1].pid)], capture_output=True, text=True).stdout.split()
    subprocess.run(["kill", "-KILL", *listed[-1:]])


def stop_a_rank(run: Path, ranks: list) -> None:
    ranks[-1].send_signal(signal.SIGSTOP)


FAULTS = {
    "renamed": {"strike": rename}, "removed": {"strike": remove}, "metrics gone": {"strike": unlink_metrics},
    "metrics cut": {"strike": cut_metrics}, "checkpoints gone": {"strike": remove_checkpoints},
    "checkpoint/ a file": {"strike": checkpoints_a_file}, "worker killed": {"strike": kill_a_worker, "workers": 1},
    "rank stopped": {"strike": stop_a_rank}, "few open files": {"before": "ulimit -n 64", "workers": 2},
    "small /dev/shm": {"before": "mount -t tmpfs -o size=64k tmpfs /dev/shm", "workers": 2},
    "stdout full": {"after": "> /dev/full"}, "stdout closed": {"after": ">&-"}, "stderr closed": {"after": "2>&-"},
}  # fmt: skip
QUIET = ("stdout full", "stdout closed", "stderr closed")  # nothing is lost, and there is nowhere to tell it


def one(name: str, ranks: int, folder: Path, draw: random.Random) -> str:
    fault = dict(FAULTS[name])
    strike = fault.pop("strike", None)
    processes = start(folder, ranks, **fault)
    metrics = folder / "run" / "metrics.jsonl"
    moment, end = draw.randrange(1, STEPS // 2), time.monotonic() + LIMIT
    try:
        while strike and time.monotonic() < end and any(process.poll() is None for process in processes):
            if (
                metrics.exists()
                and metrics.read_bytes().count(b'"loss"') >= moment
                and (folder / "run" / "checkpoint" / "latest").exists()
            ):
                strike(folder / "run", processes)
                break
            time.sleep(0.01)
        while time.monotonic() < end and all(process.poll() is None for process in processes[:1]):
            time.sleep(0.1)
        code = processes[0].poll()
    finally:
        for process in processes:
            process.kill()
            process.wait()
    text = output(folder)
    if code is None:
        return "hung"
    if "Traceback" in text:
        return "traceback"
    whole = metrics.is_file() and (folder / "run" / "student.safetensors").is_file()
    steps = re.findall(r'"step": (\d+), "loss"', metrics.read_text()) if metrics.is_file() else []
    if code == 0 and name in QUIET:
        return "told" if whole and len(steps) == STEPS else "silent"
    lines = [line for line in text.splitlines() if line.startswith(("warning: ", "error: "))]
    return "told" if lines and (code != 0 or (whole and len(steps) == STEPS)) else "silent"


@pytest.mark.soak
def test_faults_of_the_surroundings_lose_nothing_and_are_told(tmp_path):
    draw, counts, bad = random.Random(0), Counter(), []
    for ranks in (1, 2):
        for name in FAULTS:
            if name == "rank stopped" and ranks == 1:
                continue
            folder = tmp_path / f"{ranks}-{name}".replace("/", "").replace(" ", "-")
            folder.mkdir()
            pairs(folder / "pairs", count=33)
            result = one(name, ranks, folder, draw)
            counts[result] += 1
            bad += [f"{name} on {ranks}: {result}"] * (result != "told")
            print(f"{name}, {ranks} ranks: {result}", flush=True)
    print(f"{sum(counts.values())} cases:", ", ".join(f"{word} {counts[word]}" for word in WORDS), flush=True)
    assert not bad, bad
