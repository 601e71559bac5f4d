"""Interrupted and resumed runs against unbroken ones: the same metrics, weights and samples."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ds_cmli.errors import UserError
from tests.conftest import ROOT, clean_environment, free_port
from tests.drive_train import drive
from tests.test_mistakes import pairs

TIMES = {"pairs_per_s", "checkpoint_s"}
TINY = ["--preset", "tiny", "--steps", "12", "--log-every", "3", "--eval-every", "5", "--set", "student.dropout=0.2"]


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> list[str]:
    """`--data` with 60 training pairs and three held out: an epoch ends within a test, and evaluation is quick."""
    return ["--data", pairs(tmp_path_factory.mktemp("data") / "pairs", count=63)]


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_PORT": "0"}.items():
        monkeypatch.setenv(name, value)


def metrics(folder: Path) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in TIMES} for line in lines]


def assert_same(folder: Path, other: Path) -> None:
    assert metrics(folder) == metrics(other)
    assert (folder / "student.safetensors").read_bytes() == (other / "student.safetensors").read_bytes()


def json_file(path: Path, content: dict) -> list[str]:
    path.write_text(json.dumps(content))
    return ["--deepspeed_config", str(path)]


def ranks(tmp_path: Path, world_size: int, tasks: list[dict], timeout: float = 300) -> tuple[list[int], str]:
    """Exit codes and output of several trainings, one after the other, on `world_size` ranks."""
    file = tmp_path / f"tasks-{random.randrange(10**9)}.json"
    file.write_text(json.dumps([{"port": free_port(), **task} for task in tasks]))
    env = clean_environment() | {"WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "tests" / "drive_train.py"), str(file)]
    out = [file.with_suffix(f".{rank}.log") for rank in range(world_size)]
    processes = [
        subprocess.Popen(command, env=env | {"RANK": str(r), "LOCAL_RANK": str(r)}, cwd=ROOT, stdout=log.open("w"),
                         stderr=subprocess.STDOUT)
        for r, log in enumerate(out)
    ]  # fmt: skip
    for process in processes:
        process.wait(timeout)
    output = "\n".join(log.read_text() for log in out)
    assert all(process.returncode == 0 for process in processes), output
    return json.loads(next(line for line in output.splitlines() if line.startswith('{"codes"')))["codes"], output


def interrupt(arguments: list[str], folder: Path, places: list[int]) -> None:
    for place in places:
        assert drive([*arguments, "--output-dir", str(folder)], stop_at=place) == 85
    assert drive([*arguments, "--output-dir", str(folder)]) == 0


ACCUMULATION = {"gradient_accumulation_steps": 2, "bf16": {"enabled": True}, "zero_optimization": {"stage": 2}}
KINDS = {
    "zero 2 in bf16, accumulating": ACCUMULATION,
    "zero 3 in bf16": {"zero_optimization": {"stage": 3}, "bf16": {"enabled": True}},
    "zero 1 in fp32, a schedule of DeepSpeed's": {
        "zero_optimization": {"stage": 1},
        "scheduler": {
            "type": "WarmupLR",
            "params": {"warmup_min_lr": 0, "warmup_max_lr": 0.001, "warmup_num_steps": 9},
        },
    },
    "without zero": {},
}


@pytest.mark.parametrize("kind", KINDS)
def test_interrupted_at_five_places_as_if_never(kind, source, tmp_path):
    arguments = [*TINY, *source, *json_file(tmp_path / "ds.json", KINDS[kind])]
    assert drive([*arguments, "--output-dir", str(tmp_path / "straight")]) == 0
    interrupt(arguments, tmp_path / "broken", [1, 2, 5, 8, 11])
    assert_same(tmp_path / "straight", tmp_path / "broken")
    assert len(metrics(tmp_path / "broken")) == 7  # four of the loss, three evaluations


def test_two_ranks_interrupted_as_if_never(source, tmp_path):
    arguments = [*TINY, *source, *json_file(tmp_path / "ds.json", ACCUMULATION), "--micro-batch", "4", "--workers", "1"]
    broken = [*arguments, "--output-dir", str(tmp_path / "broken")]
    tasks = [
        {"arguments": [*arguments, "--output-dir", str(tmp_path / "straight")]},
        *({"arguments": broken, "stop_at": place} for place in (4, 5, 9)),
        {"arguments": broken},
    ]
    codes, _ = ranks(tmp_path, 2, tasks)
    assert codes == [0, 85, 85, 85, 0]
    assert_same(tmp_path / "straight", tmp_path / "broken")
