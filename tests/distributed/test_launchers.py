"""What each launcher sets becomes torch's own variables, or is refused in one line."""

import pytest

from ds_cmli.common.errors import UserError
from ds_cmli.distributed import launchers


def test_plain_process_is_a_world_of_one(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "SLURM_STEP_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("os.environ", dict())
    import os

    launchers.map_launcher_environment()
    assert os.environ["WORLD_SIZE"] == "1"
    assert os.environ["RANK"] == os.environ["LOCAL_RANK"] == "0"


def test_srun_task_is_mapped(monkeypatch):
    slurm = {"SLURM_STEP_ID": "0", "SLURM_NTASKS": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "1"}
    env = {**slurm, "SLURM_JOB_ID": "40007", "MASTER_ADDR": "n1"}
    monkeypatch.setattr("os.environ", env)
    launchers.map_launcher_environment()
    found = [env[k] for k in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")]
    assert found == ["3", "4", "1", "n1", "12007"]


@pytest.mark.parametrize(
    "found, line",
    [
        ({"RANK": "1"}, "RANK is 1 and WORLD_SIZE is not set"),
        (
            {"RANK": "0", "WORLD_SIZE": "1", "OMPI_COMM_WORLD_SIZE": "2"},
            "WORLD_SIZE is 2, but WORLD_SIZE is 1",
        ),
        ({"RANK": "0", "WORLD_SIZE": "1", "SLURM_STEP_NUM_TASKS": "2"}, "2 ranks were started and would not train"),
    ],
)
def test_ranks_that_would_not_train_together_are_refused(monkeypatch, found, line):
    for name in ("RANK", "WORLD_SIZE", *launchers.RANKS_STARTED):
        monkeypatch.delenv(name, raising=False)
    for name, value in found.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=line):
        launchers.map_launcher_environment()
