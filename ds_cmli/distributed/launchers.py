"""Reads from the environment how this process was started: by `deepspeed`, `torchrun`, `srun` or plain `python`.

This module imports nothing heavy: the training calls it before it imports torch.
"""

import os
import socket
import subprocess
import sys

from ds_cmli.common.errors import UserError
from ds_cmli.distributed import master_address

# Variables in which launchers give the number of processes that they have started.
RANKS_STARTED = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "LOCAL_WORLD_SIZE")
# Variables in which launchers give the number of their processes on this node.
RANKS_HERE = ("LOCAL_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE")

# The least and greatest value of each variable that is a number.
RANGES = {
    "RANK": (0, None),
    "WORLD_SIZE": (1, None),
    "LOCAL_RANK": (0, None),
    "MASTER_PORT": (0, 65535),
}
SLURM_NUMBERS = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_ID",
                 "SLURM_JOB_ID")  # fmt: skip
OF_A_TASK = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_JOB_ID")


def map_launcher_environment() -> None:
    """Set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT where the launcher has not set them.

    `deepspeed` and `torchrun` set them. For a task of `srun` they are computed from its SLURM_* variables, and a plain
    `python` process is a world of one.

    Raises:
        UserError: a variable is no number, or out of its range; the variables contradict each other; one is missing; or
            the first node's address is not known to all nodes.
    """
    env = os.environ
    _check_launcher()
    tasks = env.get("SLURM_STEP_NUM_TASKS") or env.get("SLURM_NTASKS", "1")
    if "RANK" not in env and "SLURM_STEP_ID" in env and int(tasks) > 1:
        nodes = ("SLURM_STEP_NODELIST",) if "MASTER_ADDR" not in env else ()
        for name in (*OF_A_TASK, *nodes):
            if name not in env:
                raise UserError(
                    f"SLURM_STEP_ID is set and {name} is not: start it by srun, or set RANK and WORLD_SIZE"
                )
        env["RANK"], env["WORLD_SIZE"], env["LOCAL_RANK"] = (
            env["SLURM_PROCID"],
            tasks,
            env["SLURM_LOCALID"],
        )
        # If Slurm shows each task only its own GPU (--gpus-per-task), that GPU has the number 0.
        if len(env.get("CUDA_VISIBLE_DEVICES", "").split(",")) == 1 and env.get(
            "CUDA_VISIBLE_DEVICES"
        ):
            env["LOCAL_RANK"] = "0"
        if "MASTER_ADDR" not in env:
            env["MASTER_ADDR"] = _slurm_address(env["SLURM_STEP_NODELIST"])
        env.setdefault("MASTER_PORT", str(slurm_ports()[0]))
    for name, value in {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
    }.items():
        env.setdefault(name, value)
    # Port 0 lets the store pick a free port. Only a world of one can use it, since no other rank has to find the store.
    env.setdefault("MASTER_PORT", "0" if env["WORLD_SIZE"] == "1" else "29500")
    _check_address()
    _check_ranks()


def _check_launcher() -> None:
    """Check the variables as they were found.

    Raises `UserError` if one is no number, or if several ranks were started that would not train together, each being
    a world of one.
    """
    env = os.environ
    slurm = SLURM_NUMBERS if "RANK" not in env and "SLURM_STEP_ID" in env else ()
    for name in (*RANGES, *slurm):
        _check_number(name, *RANGES.get(name, (0, None)))
    if "MASTER_ADDR" in env and not env["MASTER_ADDR"].strip():
        raise UserError(
            "MASTER_ADDR is '': give the address of the node of rank 0, or unset it for one node"
        )
    if "RANK" in env and "WORLD_SIZE" not in env:
        raise UserError(
            f"RANK is {env['RANK']} and WORLD_SIZE is not set: set both, or neither for one process"
        )
    by_slurm = "SLURM_STEP_ID" in env and "RANK" not in env
    if not by_slurm and "RANK" not in env and int(env.get("WORLD_SIZE", "1")) > 1:
        raise UserError(
            f"WORLD_SIZE is {env['WORLD_SIZE']} and RANK is not set: set both, or neither for one process"
        )
    accelerator = env.get("DS_ACCELERATOR")
    if accelerator not in (None, "cpu", "cuda"):
        raise UserError(f"DS_ACCELERATOR is {accelerator!r}: give cpu or cuda, or unset it")
    started = {name: env[name] for name in RANKS_STARTED if env.get(name, "").isdecimal()}
    for name, number in started.items():
        if "WORLD_SIZE" in env and int(number) > int(env["WORLD_SIZE"]):
            raise UserError(
                f"{name} is {number}, but WORLD_SIZE is {env['WORLD_SIZE']}: {number} ranks were started and would not "
                "train together; unset RANK and WORLD_SIZE, or set them for every rank"
            )


def _check_number(name: str, least: int, most: int | None) -> None:
    value = os.environ.get(name)
    if value is None:
        return
    if not (
        value.isdecimal()
        and len(value) < 19
        and int(value) >= least
        and (most is None or int(value) <= most)
    ):
        bounds = f"from {least} on" if most is None else f"from {least} to {most}"
        raise UserError(
            f"{name} is {value!r}: give a whole number {bounds}, or let the launcher set it"
        )


def _check_ranks() -> None:
    """Raise `UserError` if this process's rank is none of the run's, or cannot meet the others."""
    env = os.environ
    rank, ranks, local = int(env["RANK"]), int(env["WORLD_SIZE"]), int(env["LOCAL_RANK"])
    if rank >= ranks:
        raise UserError(f"RANK is {rank} and WORLD_SIZE is {ranks}: the ranks are 0 to {ranks - 1}")
    if local >= ranks:
        raise UserError(
            f"LOCAL_RANK is {local} and WORLD_SIZE is {ranks}: it is a rank's number on its node, from 0"
        )
    if ranks > 1 and env["MASTER_PORT"] == "0":
        raise UserError(
            f"MASTER_PORT is 0 and WORLD_SIZE is {ranks}: give a port that all ranks know"
        )
    try:
        socket.getaddrinfo(env["MASTER_ADDR"], None)
    except OSError as error:
        raise UserError(
            f"MASTER_ADDR is {env['MASTER_ADDR']!r}, which this node cannot resolve ({error.strerror}): give the "
            "address of the node of rank 0"
        ) from None


def _check_address() -> None:
    """Raise `UserError` if the run has several nodes, some of which would not find rank 0 at MASTER_ADDR."""
    env = os.environ
    if (
        "LOCAL_WORLD_SIZE" in env
    ):  # torchrun's agents have met already, and several may run on one machine
        return
    rank, ranks = int(env["RANK"]), int(env["WORLD_SIZE"])
    here = [int(env[name]) for name in RANKS_HERE if env.get(name, "").isdecimal()]
    if here:
        several, first_node = here[0] < ranks, rank < here[0]
    else:
        several = is_slurm_step() and int(env.get("SLURM_STEP_NUM_NODES", "1")) > 1
        first_node = env.get("SLURM_NODEID", "0") == "0"
    line = address_mistake(first_node) if several else None
    if line is None:
        return
    if (
        rank
        and env["LOCAL_RANK"] == "0"
        and not master_address.means_every_machine(env["MASTER_ADDR"])
    ):
        print(
            f"error: {line}", file=sys.stderr, flush=True
        )  # only this node may see it so, and rank 0 prints for all
    raise UserError(line)


def address_mistake(first_node: bool) -> str | None:
    """Why the nodes of a run on several do not meet at MASTER_ADDR; None if they do, or may."""
    line = master_address.mistake(os.environ["MASTER_ADDR"], first_node)
    nodes = os.environ.get("SLURM_STEP_NODELIST")
    if line is not None and nodes:
        try:  # several nodes of Slurm may be one machine, where a loopback address is right
            first = _scontrol("show", "hostnames", nodes).split()[0]
            if master_address.means_every_machine(_node_address(first)):
                return None
        except (OSError, subprocess.CalledProcessError, IndexError):
            pass
    return line


def _slurm_address(nodes: str) -> str:
    """The address of the first node of a Slurm node list, on which rank 0 runs.

    Raises:
        UserError: `scontrol` is not installed (as inside a container), or does not know the node.
    """
    try:
        first = _scontrol("show", "hostnames", nodes).split()[0]
        try:
            socket.getaddrinfo(first, None)
            return first
        except OSError:  # this machine cannot resolve the name that the node has in Slurm
            return _node_address(first)
    except (OSError, subprocess.CalledProcessError, IndexError):
        raise UserError(
            f"MASTER_ADDR is not set, and scontrol gives no address for the nodes {nodes!r}: "
            "set MASTER_ADDR to the first node's address"
        ) from None


def _node_address(node: str) -> str:
    return _scontrol("show", "node", node).split("NodeAddr=", 1)[1].split()[0]


def _scontrol(*arguments: str) -> str:
    return subprocess.run(
        ["scontrol", *arguments], capture_output=True, text=True, check=True
    ).stdout


def slurm_ports() -> list[int]:
    """Candidate ports of a Slurm job's step, in the order to try; below the ephemeral ports (32768 and above)."""
    number = int(os.environ["SLURM_JOB_ID"]) + 1009 * int(os.environ["SLURM_STEP_ID"])
    return [12000 + (number + 2003 * i) % 20000 for i in range(8)]


def is_slurm_step() -> bool:
    """Whether the ranks of this run are the tasks of one `srun` step."""
    env = os.environ
    same = (("SLURM_PROCID", "RANK"), ("SLURM_STEP_NUM_TASKS", "WORLD_SIZE"))
    return "SLURM_STEP_ID" in env and all(env.get(theirs) == env[ours] for theirs, ours in same)
