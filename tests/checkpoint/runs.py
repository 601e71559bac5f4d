"""Runs that tests break and go on with, on one rank or several, and damage to their files."""

import json
import os
import random
import signal
import time
from pathlib import Path

from tests.conftest import ROOT, free_port, rank_environments
from tests.metrics_file import metrics
from tests.processes import Program

TINY = ["--preset", "tiny", "--steps", "12", "--log-every", "3", "--eval-every", "5"]


TINY += ["--set", "student.dropout=0.2", "--set", "run.match_maps=1", "--set", "teacher.block=0"]


AUGMENTED = ["--set", 'data.augmentation={"random_resized_crop": 0.5, "horizontal_flip": 0.5, "color_jitter": 0.4}']


def assert_same(folder: Path, other: Path) -> None:
    assert metrics(folder) == metrics(other)
    assert (folder / "student.safetensors").read_bytes() == (other / "student.safetensors").read_bytes()
    averages = [run / "student_ema.safetensors" for run in (folder, other)]
    assert averages[0].exists() == averages[1].exists()
    if averages[0].exists():
        assert averages[0].read_bytes() == averages[1].read_bytes()


def json_file(path: Path, content: dict) -> list[str]:
    path.write_text(json.dumps(content))
    return ["--deepspeed_config", str(path)]


def ranks(tmp_path: Path, world_size: int, tasks: list[dict], timeout: float = 300) -> tuple[list[int], str]:
    """Exit codes and output of several trainings, one after the other, on `world_size` ranks."""
    file = tmp_path / f"tasks-{random.randrange(10**9)}.json"
    file.write_text(json.dumps([{"port": free_port(), **task} for task in tasks]))
    command = [str(ROOT / "tests" / "drive_train.py"), str(file)]
    out = [file.with_suffix(f".{rank}.log") for rank in range(world_size)]
    processes = [Program(command, env, ROOT, log) for log, env in zip(out, rank_environments(world_size), strict=True)]
    end = time.monotonic() + timeout
    while any(process.poll() is None for process in processes) and time.monotonic() < end:
        if any(process.poll() for process in processes):
            break  # the others would wait for the one that failed
        time.sleep(0.1)
    for process in processes:
        process.kill()
        process.wait()
    output = "\n".join(log.read_text() for log in out)
    assert all(process.returncode == 0 for process in processes), output
    return json.loads(next(line for line in output.splitlines() if line.startswith('{"codes"')))["codes"], output


class Ranks:
    """Processes of one run, started as a scheduler does, one for each rank."""

    def __init__(self, folder: Path, world_size: int, arguments: list[str]):
        self.logs = [folder / f"{rank}.log" for rank in range(world_size)]
        command = [str(ROOT / "ds_cmli" / "train.py"), *arguments]
        self.processes = [
            Program(command, env, ROOT, log) for log, env in zip(self.logs, rank_environments(world_size), strict=True)
        ]

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


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip(path, byte=0):
    content = bytearray(path.read_bytes())
    content[byte] ^= 1
    path.write_bytes(content)


def lengthen(path):
    path.write_bytes(path.read_bytes() + b"\0")


def remove(path):
    path.unlink()


DAMAGES = (truncate, flip, lengthen, remove)


class Evil:
    def __reduce__(self):
        return os.mkdir, (self.path,)

    def __init__(self, path):
        self.path = path


STEPS = 8
