"""Runs that tests break and go on with, on one rank or several, and damage to their files."""

import json
import os
import signal
import time
from pathlib import Path

from tests.drive_train import drive, drive_each
from tests.metrics_file import metrics
from tests.ranks import free_port, run, start_ranks

AUGMENTED = ["--set", 'data.augmentation={"random_resized_crop": 0.5, "horizontal_flip": 0.5, "color_jitter": 0.4}']


def assert_same(folder: Path, other: Path) -> None:
    assert metrics(folder) == metrics(other)
    assert (folder / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()
    averages = [run / "model.ema.safetensors" for run in (folder, other)]
    assert averages[0].exists() == averages[1].exists()
    if averages[0].exists():
        assert averages[0].read_bytes() == averages[1].read_bytes()


def json_file(path: Path, content: dict) -> list[str]:
    path.write_text(json.dumps(content))
    return ["--deepspeed_config", str(path)]


def ranks(world_size: int, tasks: list[dict], timeout: float = 600) -> tuple[list[int], str]:
    """Exit codes and output of several trainings, one after the other, on `world_size` ranks."""
    tasks = [{"port": free_port(), **task} for task in tasks]
    results = run(drive_each, world_size, tasks, group=False, timeout=timeout)
    return results[0][0], "\n".join(output for _, output in results)


def straight_and_stopped(given: list[str], folder: Path, stop_at: int, two: bool, *stopped: str) -> Path:
    """The folder of a training on one rank or two, the same as in two pieces; the first also gets `stopped`."""
    straight, broken = folder / "straight", folder / "broken"
    tasks: list[dict] = [
        {"arguments": [*given, "--output-dir", str(straight)]},
        {"arguments": [*given, "--output-dir", str(broken), *stopped], "stop_at": stop_at},
        {"arguments": [*given, "--output-dir", str(broken)]},
    ]
    if two:
        codes, _ = ranks(2, tasks)
    else:
        codes = [drive(task["arguments"], task.get("stop_at")) for task in tasks]
    assert codes == [0, 85, 0]
    assert_same(straight, broken)
    return straight


class Code:
    """In a pickle: makes a folder when it is loaded."""

    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


class Ranks:
    """Processes of one run, started as a scheduler does, one for each rank."""

    def __init__(self, folder: Path, world_size: int, arguments: list[str]):
        self.logs = [folder / f"{rank}.log" for rank in range(world_size)]
        self.processes = start_ranks(["ds_cmli/train.py", *arguments], self.logs)

    @property
    def output(self) -> str:
        return self.logs[0].read_text()

    def wait_until(self, condition, seconds: float = 120) -> bool:
        """False where the processes have ended before."""
        end = time.monotonic() + seconds
        while not condition():
            if self.processes[0].poll() is not None:
                return False
            assert time.monotonic() < end, self.output
            time.sleep(0.001)
        return True

    def kill(self, ranks: list[int]) -> None:
        for rank in ranks:
            self.processes[rank].send_signal(signal.SIGKILL)
        for process in self.processes:
            if len(ranks) < len(self.processes):
                time.sleep(0.2)  # the others notice, or hang: a launcher ends them
            process.kill()
            process.wait()

    def wait(self) -> list[int]:
        return [process.wait(300) for process in self.processes]
