"""Two ranks over NCCL, killed after a checkpoint and started again."""

import json
import time
from pathlib import Path

import pytest

from tests.conftest import free_port
from tests.make import pairs
from tests.null_gpu import processes
from tests.processes import Program

pytestmark = pytest.mark.null_gpu


def start(environment: dict[str, str], folder: Path, *command: str) -> list[Program]:
    """The processes of two ranks, whose output goes to the files `0.log` and `1.log` of a folder."""
    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    started = []
    for rank in ("0", "1"):
        env = environment | group | {"RANK": rank, "LOCAL_RANK": rank}
        (folder / f"{rank}.log").write_text("")
        started.append(processes.start(env, [*command], folder / f"{rank}.log"))
    return started


def kill(ranks: list[Program]) -> None:
    for process in ranks:
        process.kill()
        process.wait()


def test_messages_arrive(null_gpu, tmp_path):
    ranks = start(null_gpu("h100", count=2), tmp_path, "tests/null_gpu/collectives.py")
    try:
        codes = [process.wait(200) for process in ranks]
    finally:
        kill(ranks)
    logs = [(tmp_path / f"{rank}.log").read_text() for rank in (0, 1)]
    assert codes == [0, 0], logs
    for rank, log in enumerate(logs):
        lines = [line for line in log.splitlines() if line.startswith("{")]
        assert json.loads(lines[0]) == {
            "gathered": [10, 3010],
            "broadcast": ["a", 5, "b" * 100],
            "summed": [3] * 5,
            "part": [[1, 2], [3, 5]][rank],
            "exchanged": [1 - rank] * 3,
        }


def test_two_ranks_go_on_after_a_kill(null_gpu, tmp_path):
    run, environment = tmp_path / "run", null_gpu("3090", count=2)
    (tmp_path / "ds.json").write_text(json.dumps({"fp16": {"enabled": True}, "zero_optimization": {"stage": 2}}))
    options = ["--preset", "tiny", "--steps", "4", "--save-every", "2", "--set", "run.match_maps=0"]
    options += ["--output-dir", str(run)]
    options += ["--deepspeed_config", str(tmp_path / "ds.json"), "--data", pairs(tmp_path / "pairs", count=64)]

    first = start(environment, tmp_path, "ds_cmli/train.py", *options)
    try:
        end = time.monotonic() + 400
        while not (run / "checkpoint" / "latest").exists():
            output = (tmp_path / "0.log").read_text()
            assert all(process.poll() is None for process in first), output
            assert time.monotonic() < end, output
            time.sleep(0.1)
    finally:
        kill(first)

    second = start(environment, tmp_path, "ds_cmli/train.py", *options)
    try:
        codes = [process.wait(400) for process in second]
    finally:
        kill(second)
    output = (tmp_path / "0.log").read_text()
    assert codes == [0, 0], output
    assert f"resuming from {run / 'checkpoint' / 'step2'}\n" in output
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4]
