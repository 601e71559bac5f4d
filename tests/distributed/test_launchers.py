"""Variables of each launcher become torch's own, or are refused in one line."""

import os
import stat

import pytest

from ds_cmli import engine
from ds_cmli.config.deepspeed_config import DeepSpeedConfig
from ds_cmli.distributed import RANK_VARIABLES, map_launcher_environment
from ds_cmli.errors import UserError
from tests.conftest import ZERO1
from tests.ranks import environments, start

SRUN = {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "1",
        "SLURM_JOB_ID": "40007", "SLURM_STEP_NODELIST": "n[1-2]"}  # fmt: skip


def mapped(monkeypatch, env: dict[str, str]) -> list[str]:
    monkeypatch.setattr("os.environ", env)
    map_launcher_environment()
    return [env[name] for name in RANK_VARIABLES]


def test_a_plain_process_is_a_world_of_one(monkeypatch):
    assert mapped(monkeypatch, {})[:3] == ["0", "1", "0"]
    assert mapped(monkeypatch, {**SRUN, "SLURM_STEP_NUM_TASKS": "1"})[:3] == ["0", "1", "0"]


def test_a_task_of_srun_is_mapped(monkeypatch, tmp_path):
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(
        '#!/bin/sh\n[ "$2" = hostnames ] && echo "n1\nn2" || echo "NodeName=$3\n NodeAddr=10.0.0.7 X=1"'
    )
    scontrol.chmod(scontrol.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    env = {"PATH": os.environ["PATH"], **SRUN}
    assert mapped(monkeypatch, env) == ["3", "4", "1", "10.0.0.7", "12007"]
    one_gpu = {**SRUN, "MASTER_ADDR": "a", "CUDA_VISIBLE_DEVICES": "1"}
    assert mapped(monkeypatch, one_gpu) == ["3", "4", "0", "a", "12007"]
    env = {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "0,1"}
    mapped(monkeypatch, env)
    assert env["CUDA_VISIBLE_DEVICES"] == ""


@pytest.mark.parametrize(
    ("variables", "line"),
    [
        ("WORLD_SIZE=2", "RANK, WORLD_SIZE and LOCAL_RANK: KeyError: 'RANK'"),
        ("RANK=1", "RANK is 1 and WORLD_SIZE is 1: the ranks are 0 to 0"),
        ("RANK=2 WORLD_SIZE=2", "RANK is 2 and WORLD_SIZE is 2: the ranks are 0 to 1"),
        ("SLURM_STEP_ID=0 SLURM_NTASKS=2", "SLURM_STEP_ID is set: start it by srun, .*: KeyError: 'SLURM_LOCALID'"),
    ],
)
def test_an_environment_that_no_launcher_sets_is_one_line(monkeypatch, variables, line):
    with pytest.raises(UserError, match=f"^{line}"):
        mapped(monkeypatch, dict(pair.split("=") for pair in variables.split()))


def test_a_device_that_is_not_here(monkeypatch):
    ds_config = DeepSpeedConfig.of(ZERO1)  # it imports DeepSpeed, which looks for its device once
    monkeypatch.setenv("DS_ACCELERATOR", "cuda")
    with pytest.raises(UserError, match=r"^DS_ACCELERATOR is 'cuda' and PyTorch trains on cpu here: unset it"):
        engine.adapt_to_device(ds_config)


@pytest.mark.slow
def test_a_rank_that_does_not_come_ends_the_other_with_one_line(tmp_path):
    code = "from datetime import timedelta; from ds_cmli.distributed import process_group as p; " \
        "p.TIMEOUT = timedelta(seconds=2); p.init()"  # fmt: skip
    log = tmp_path / "log"
    assert start(["-c", code], environments(2)[0], log).wait(60) == 1
    assert "UserError: rank 0 of 2 cannot start: DistStoreError: " in log.read_text()
