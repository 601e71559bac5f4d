"""Addresses at which the other nodes would not find rank 0, under each launcher."""

import socket

import pytest

from ds_cmli.common.errors import UserError
from ds_cmli.distributed import launchers

TORCHRUN = {"RANK": "2", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "1"}
DEEPSPEED = {"RANK": "0", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "LOCAL_SIZE": "2", "CROSS_RANK": "0"}
SRUN = {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1", "SLURM_LOCALID": "0",
        "SLURM_JOB_ID": "7", "SLURM_STEP_NUM_NODES": "2", "SLURM_NODEID": "1"}  # fmt: skip
EVERY = "by which every node means itself, and this run has several nodes: set it to the first node's"


@pytest.mark.parametrize("launcher", [DEEPSPEED, SRUN], ids=["deepspeed", "srun"])
@pytest.mark.parametrize("address", ["127.0.0.1", "127.0.1.1", "localhost", "::1", "0.0.0.0", "::", "::ffff:127.0.0.1"])
def test_an_address_of_every_machine_is_refused_on_several_nodes(monkeypatch, launcher, address):
    monkeypatch.setattr("os.environ", {**launcher, "MASTER_ADDR": address})
    with pytest.raises(UserError, match=f"MASTER_ADDR is '{address}', {EVERY}"):
        launchers.map_launcher_environment()
    one = {"WORLD_SIZE": "2", "SLURM_STEP_NUM_NODES": "1", "MASTER_ADDR": address}
    monkeypatch.setattr("os.environ", {**launcher, **one, "RANK": "0"})
    launchers.map_launcher_environment()


def test_two_agents_of_torchrun_on_one_machine_meet_there(monkeypatch):
    monkeypatch.setattr("os.environ", {**TORCHRUN, "MASTER_ADDR": "127.0.0.1"})
    launchers.map_launcher_environment()


def test_names_of_the_first_node(monkeypatch, capsys):
    names = {"n1": "127.0.1.1", "alias": "127.0.1.1", "n2": "10.0.0.2"}

    def look_up(name, port):
        if name not in names:
            raise socket.gaierror(socket.EAI_NONAME, "unknown")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (names[name], 0))]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    first = {**SRUN, "SLURM_PROCID": "0", "SLURM_NODEID": "0", "SLURMD_NODENAME": "n1"}
    second = {**SRUN, "SLURMD_NODENAME": "n2"}
    for env, address, line in (
        (first, "n1", None),  # its own name is a loopback address on Debian, and that of others is not
        (second, "n1", "which on node n2 is 127.0.1.1, the node itself"),
        (first, "alias", "which on node n1 is 127.0.1.1, the node itself"),
        (first, "n2", None),
        (second, "nowhere", "a name that node n2 does not know"),
    ):
        monkeypatch.setattr("os.environ", {**env, "MASTER_ADDR": address})
        if line is None:
            launchers.map_launcher_environment()
            continue
        with pytest.raises(UserError, match=f"MASTER_ADDR is '{address}', {line}"):
            launchers.map_launcher_environment()
        assert capsys.readouterr().err.count("error: ") == (env is second)  # rank 0's is printed by the command
