"""`torchrun --max-restarts`, a rank killed: the run goes on from its checkpoint."""

import re
import subprocess

import psutil
import pytest

from tests import make
from tests.checkpoint.runs import assert_same
from tests.ranks import ROOT, clean_environment, launcher, start_ranks, wait_for

STEPS = 20


@pytest.mark.slow
def test_a_rank_is_killed_and_the_end_is_that_of_an_unbroken_run(tmp_path):
    run, log = tmp_path / "run", tmp_path / "log"
    # In 16 bits, the sums of one rank and of two differ by percents of a matrix after some steps.
    fp32 = make.json_file(tmp_path / "fp32.json", {"zero_optimization": {"stage": 2}})
    options = {"--steps": STEPS, "--log-every": 1, "--save-every": 3, "--deepspeed_config": fp32}
    options["--data"] = make.pairs(tmp_path / "pairs", count=63)
    words = make.small(options)
    logs = [tmp_path / f"{rank}.log" for rank in range(2)]
    unbroken = start_ranks(["ds_cmli/train.py", *words, "--output-dir", tmp_path / "unbroken"], logs)
    assert [process.wait(300) for process in unbroken] == [0, 0], logs[0].read_text()

    command = [*launcher("torchrun", 2), "--max-restarts=1", "--monitor-interval=0.1", "--shutdown-timeout=5"]
    env = clean_environment() | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "DS_CMLI_JOB": "a job"}
    with log.open("w") as out:
        process = subprocess.Popen(
            [*command, str(ROOT / "ds_cmli" / "train.py"), *words, "--output-dir", str(run)],
            cwd=ROOT, env=env, stdout=out, stderr=subprocess.STDOUT, process_group=0,
        )  # fmt: skip
    wait_for((run / "checkpoint" / "latest").is_file, process, log)
    ranks = {child.environ().get("RANK"): child for child in psutil.Process(process.pid).children()}
    ranks["1"].kill()
    assert process.wait(300) == 0, log.read_text()
    (step,) = re.findall(r"resuming from \S+step0*(\d+)\n", log.read_text())
    assert 0 < int(step) < STEPS
    assert_same(tmp_path / "unbroken", run)
