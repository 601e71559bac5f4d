"""What each launcher sets becomes torch's own variables, or is refused in one line."""

import socket

import pytest

from ds_cmli.common.errors import UserError
from ds_cmli.distributed import launchers
from tests.conftest import ZERO1


def test_plain_process_is_a_world_of_one(monkeypatch):
    env: dict[str, str] = {}
    monkeypatch.setattr("os.environ", env)
    launchers.map_launcher_environment()
    assert (env["WORLD_SIZE"], env["RANK"], env["LOCAL_RANK"]) == ("1", "0", "0")


def test_srun_task_is_mapped(monkeypatch):
    slurm = {"SLURM_STEP_ID": "0", "SLURM_NTASKS": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "1"}
    env = {**slurm, "SLURM_JOB_ID": "40007", "MASTER_ADDR": "localhost"}
    monkeypatch.setattr("os.environ", env)
    launchers.map_launcher_environment()
    result = [env[k] for k in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")]
    assert result == ["3", "4", "1", "localhost", "12007"]


def test_the_cpu_is_asked_for_where_a_launcher_has_given_gpus(monkeypatch):
    env = {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "0,1"}
    monkeypatch.setattr("os.environ", env)
    launchers.map_launcher_environment()
    assert env["CUDA_VISIBLE_DEVICES"] == ""


LINES = [
    ("WORLD_SIZE=two RANK=0", "WORLD_SIZE is 'two': give a whole number from 1 on"),
    ("WORLD_SIZE=0", "WORLD_SIZE is '0': give a whole number from 1 on"),
    ("WORLD_SIZE=2", "WORLD_SIZE is 2 and RANK is not set"),
    ("RANK=1", "RANK is 1 and WORLD_SIZE is not set"),
    ("RANK=x", "RANK is 'x': give a whole number from 0 on"),
    ("RANK=", "RANK is '': give a whole number"),
    ("RANK=3 WORLD_SIZE=1", "RANK is 3 and WORLD_SIZE is 1: the ranks are 0 to 0"),
    ("RANK=2 WORLD_SIZE=2", "RANK is 2 and WORLD_SIZE is 2: the ranks are 0 to 1"),
    ("LOCAL_RANK=-1", "LOCAL_RANK is '-1'"),
    ("LOCAL_RANK=4", "LOCAL_RANK is 4 and WORLD_SIZE is 1"),
    ("MASTER_PORT=x", "MASTER_PORT is 'x': give a whole number from 0 to 65535"),
    ("MASTER_PORT=99999", "MASTER_PORT is '99999'"),
    ("RANK=1 WORLD_SIZE=2 MASTER_PORT=0", "MASTER_PORT is 0 and WORLD_SIZE is 2"),
    ("MASTER_ADDR=", "MASTER_ADDR is ''"),
    ("MASTER_ADDR=no.such.invalid", "MASTER_ADDR is 'no.such.invalid', which this node cannot resolve"),
    ("SLURM_STEP_ID=x SLURM_NTASKS=2", "SLURM_STEP_ID is 'x'"),
    ("SLURM_STEP_ID=0 SLURM_NTASKS=few", "SLURM_NTASKS is 'few'"),
    ("SLURM_STEP_ID=0 SLURM_NTASKS=2", "SLURM_STEP_ID is set and SLURM_PROCID is not"),
    (
        "SLURM_STEP_ID=0 SLURM_NTASKS=2 SLURM_PROCID=0 SLURM_LOCALID=0 SLURM_JOB_ID=3",
        "SLURM_STEP_ID is set and SLURM_STEP_NODELIST is not",
    ),
    ("DS_ACCELERATOR=foo", "DS_ACCELERATOR is 'foo': give cpu or cuda"),
    ("RANK=0 WORLD_SIZE=1 OMPI_COMM_WORLD_SIZE=2", "OMPI_COMM_WORLD_SIZE is 2, but WORLD_SIZE is 1"),
    ("RANK=0 WORLD_SIZE=1 SLURM_STEP_NUM_TASKS=2", "SLURM_STEP_NUM_TASKS is 2, but WORLD_SIZE is 1"),
]


@pytest.mark.parametrize("given, line", LINES)
def test_an_environment_that_no_launcher_sets_is_one_line(monkeypatch, capsys, given, line):
    import click

    from ds_cmli.common.cli import exit_code

    monkeypatch.setattr("os.environ", dict(pair.split("=") for pair in given.split()))
    monkeypatch.setattr("sys.argv", ["command"])
    assert exit_code(click.command()(launchers.map_launcher_environment)) == 2
    printed = capsys.readouterr().err
    # Rank 0 speaks for all; rank 1 of a run of two is silent.
    assert printed.startswith("" if given.startswith("RANK=1 W") else f"error: {line}") and printed.count("\n") <= 1
    with pytest.raises(UserError, match=line.replace("(", ".")):
        launchers.map_launcher_environment()


def test_a_device_that_is_not_here(monkeypatch, capsys):
    from ds_cmli import engine
    from ds_cmli.config.deepspeed_config import DeepSpeedConfig

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "99")
    engine.on_this_device(DeepSpeedConfig.of(ZERO1))
    line = "CUDA_VISIBLE_DEVICES is '99', and PyTorch finds no GPU there: training on the CPU\n"
    assert line in capsys.readouterr().out
    monkeypatch.setenv("DS_ACCELERATOR", "cuda")
    with pytest.raises(UserError, match=r"^DS_ACCELERATOR is 'cuda' and PyTorch finds no GPU here: unset it to tr"):
        engine.on_this_device(DeepSpeedConfig.of(ZERO1))


# Addresses at which the other nodes would not find rank 0, under each launcher.
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
