"""`torchrun --max-restarts`, a rank killed: the run goes on from its checkpoint."""

import json
import re
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.checkpoint.runs import Ranks, assert_same
from tests.make import pairs
from tests.ranks import ROOT, clean_environment, free_port, wait_for

TORCHRUN = str(Path(sys.executable).with_name("torchrun"))
STEPS = 20


@pytest.fixture(scope="module")
def options(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("data")
    data = pairs(folder / "pairs", count=63)
    # In 16 bits, the sums of one rank and of two differ by percents of a matrix after some steps.
    fp32 = json.loads((ROOT / "ds_configs" / "zero2.json").read_text()) | {"fp16": {"enabled": False}}
    (folder / "fp32.json").write_text(json.dumps(fp32))
    given = ["--preset", "tiny", "--steps", str(STEPS), "--micro-batch", "8", "--log-every", "1", "--save-every", "3"]
    given += ["--set", "data.image_size=28", "--set", "run.match_maps=0"]
    given += ["--deepspeed_config", str(folder / "fp32.json")]
    return [*given, "--data", data, "--output-dir"]


@pytest.fixture(scope="module")
def unbroken(options, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("unbroken")
    ranks = Ranks(folder, 2, [*options, str(folder / "run")])
    assert ranks.wait() == [0, 0], ranks.output
    return folder / "run"


def start(run: Path, options: list[str], *of_torchrun: str) -> subprocess.Popen:
    env = clean_environment() | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "DS_CMLI_JOB": "a job"}
    command = [TORCHRUN, "--max-restarts=1", "--monitor-interval=0.1", "--shutdown-timeout=5", *of_torchrun]
    with open(f"{run}.log", "a") as out:
        return subprocess.Popen(
            [*command, str(ROOT / "ds_cmli" / "train.py"), *options, str(run)],
            cwd=ROOT, env=env, stdout=out, stderr=subprocess.STDOUT, process_group=0,
        )  # fmt: skip


def resumed_from(run: Path) -> list[int]:
    return [int(step) for step in re.findall(r"resuming from \S+step0*(\d+)\n", Path(f"{run}.log").read_text())]


@pytest.mark.slow
def test_a_rank_is_killed_and_the_end_is_that_of_an_unbroken_run(options, unbroken, tmp_path):
    run = tmp_path / "run"
    process = start(run, options, "--nproc-per-node=2", f"--master-port={free_port()}")
    wait_for((run / "checkpoint" / "latest").is_file, process, Path(f"{run}.log"))
    ranks = {child.environ().get("RANK"): child for child in psutil.Process(process.pid).children()}
    ranks["1"].kill()
    assert process.wait(300) == 0, Path(f"{run}.log").read_text()
    [step] = resumed_from(run)
    assert 0 < step < STEPS
    assert_same(unbroken, run)
