"""Reads from the environment which launcher has started this process, and as what rank.

This module imports nothing heavy: the training calls it before it imports torch, and
`slurm/check.py` before anything else is known to be installed.
"""

import ipaddress
import os
import socket
import subprocess
import sys

from ds_cmli.common.errors import UserError

# Variables in which launchers give the number of processes that they have started.
RANKS_STARTED = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "LOCAL_WORLD_SIZE")
# Variables in which launchers give the number of their processes on this node.
RANKS_HERE = ("LOCAL_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE")
# Variables that launchers set for a rank. A process that is no rank is started without them.
OF_A_RANK = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")

# The least and greatest value of each variable that is a number.
RANGES: dict[str, tuple[int, int | None]] = {
    "RANK": (0, None),
    "WORLD_SIZE": (1, None),
    "LOCAL_RANK": (0, None),
    "MASTER_PORT": (0, 65535),
}
OF_A_TASK = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_JOB_ID")
SLURM_NUMBERS = (*OF_A_TASK, "SLURM_NTASKS", "SLURM_STEP_NUM_TASKS", "SLURM_STEP_ID")


def map_launcher_environment() -> None:
    """Set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT where no launcher has.

    `deepspeed` and `torchrun` set them. For a task of `srun` they are computed from its SLURM_*
    variables, and a plain `python` process is a world of one. GPUs are hidden if DS_ACCELERATOR is
    cpu.

    Raises:
        UserError: a variable is no number, or out of its range; the variables contradict each
            other; one is missing; or the first node's address is not known to all nodes.
    """
    env = os.environ
    _check_launcher()
    tasks = env.get("SLURM_STEP_NUM_TASKS") or env.get("SLURM_NTASKS", "1")
    if _is_slurm_task() and int(tasks) > 1:
        _map_slurm(tasks)
    env.setdefault("RANK", "0")
    env.setdefault("WORLD_SIZE", "1")
    env.setdefault("LOCAL_RANK", "0")
    env.setdefault("MASTER_ADDR", "127.0.0.1")
    # Port 0 lets the store pick a free port. Only a world of one can use it, since no other rank
    # has to find the store.
    env.setdefault("MASTER_PORT", "0" if env["WORLD_SIZE"] == "1" else "29500")
    if env.get("DS_ACCELERATOR") == "cpu":
        env["CUDA_VISIBLE_DEVICES"] = ""  # the launcher of DeepSpeed sets it on CPUs, too
    _check_address()
    _check_ranks()


def _is_slurm_task() -> bool:
    """Whether `srun` has started this process, and nothing else has made it a rank."""
    return "SLURM_STEP_ID" in os.environ and "RANK" not in os.environ


def _map_slurm(tasks: str) -> None:
    env = os.environ
    needed = list(OF_A_TASK)
    if "MASTER_ADDR" not in env:
        needed.append("SLURM_STEP_NODELIST")
    for name in needed:
        if name not in env:
            raise UserError(
                f"SLURM_STEP_ID is set and {name} is not: start it by srun, or set RANK and "
                "WORLD_SIZE"
            )
    env["RANK"] = env["SLURM_PROCID"]
    env["WORLD_SIZE"] = tasks
    env["LOCAL_RANK"] = env["SLURM_LOCALID"]
    # If Slurm shows each task only its own GPU (--gpus-per-task), that GPU has the number 0.
    shown = env.get("CUDA_VISIBLE_DEVICES")
    if shown and "," not in shown:
        env["LOCAL_RANK"] = "0"
    if "MASTER_ADDR" not in env:
        env["MASTER_ADDR"] = _slurm_address(env["SLURM_STEP_NODELIST"])
    env.setdefault("MASTER_PORT", str(slurm_ports()[0]))


def _check_launcher() -> None:
    """Check the variables as they were found.

    Raises `UserError` if one is no number, or if several ranks were started that would not train
    together, each being a world of one.
    """
    env = os.environ
    for name, (least, most) in RANGES.items():
        _check_number(name, least, most)
    for name in SLURM_NUMBERS if _is_slurm_task() else ():
        _check_number(name, 0, None)
    if "MASTER_ADDR" in env and not env["MASTER_ADDR"].strip():
        raise UserError(
            "MASTER_ADDR is '': give the address of the node of rank 0, or unset it for one node"
        )
    both = "set both, or neither for one process"
    if "RANK" in env and "WORLD_SIZE" not in env:
        raise UserError(f"RANK is {env['RANK']} and WORLD_SIZE is not set: {both}")
    alone = "RANK" not in env and "SLURM_STEP_ID" not in env
    if alone and int(env.get("WORLD_SIZE", "1")) > 1:
        raise UserError(f"WORLD_SIZE is {env['WORLD_SIZE']} and RANK is not set: {both}")
    accelerator = env.get("DS_ACCELERATOR")
    if accelerator not in (None, "cpu", "cuda"):
        raise UserError(f"DS_ACCELERATOR is {accelerator!r}: give cpu or cuda, or unset it")
    for name in RANKS_STARTED:
        number = env.get(name, "")
        if "WORLD_SIZE" in env and number.isdecimal() and int(number) > int(env["WORLD_SIZE"]):
            raise UserError(
                f"{name} is {number}, but WORLD_SIZE is {env['WORLD_SIZE']}: {number} ranks were "
                "started and would not train together; unset RANK and WORLD_SIZE, or set them for "
                "every rank"
            )


def _check_number(name: str, least: int, most: int | None) -> None:
    value = os.environ.get(name)
    if value is None:
        return
    whole = value.isdecimal() and len(value) < 19
    if not whole or int(value) < least or (most is not None and int(value) > most):
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
            f"LOCAL_RANK is {local} and WORLD_SIZE is {ranks}: it is a rank's number on its node, "
            "from 0"
        )
    if ranks > 1 and env["MASTER_PORT"] == "0":
        raise UserError(
            f"MASTER_PORT is 0 and WORLD_SIZE is {ranks}: give a port that all ranks know"
        )
    try:
        socket.getaddrinfo(env["MASTER_ADDR"], None)
    except OSError as error:
        raise UserError(
            f"MASTER_ADDR is {env['MASTER_ADDR']!r}, which this node cannot resolve "
            f"({error.strerror}): give the address of the node of rank 0"
        ) from None


def _check_address() -> None:
    """Raise `UserError` if some of several nodes would not find rank 0 at MASTER_ADDR."""
    env = os.environ
    # torchrun's agents have met already, and several may run on one machine.
    if "LOCAL_WORLD_SIZE" in env:
        return
    rank, ranks = int(env["RANK"]), int(env["WORLD_SIZE"])
    several = is_slurm_step() and int(env.get("SLURM_STEP_NUM_NODES", "1")) > 1
    first_node = env.get("SLURM_NODEID", "0") == "0"
    for name in RANKS_HERE:
        if env.get(name, "").isdecimal():
            several, first_node = int(env[name]) < ranks, rank < int(env[name])
            break
    line = address_mistake(first_node) if several else None
    if line is None:
        return
    # Only this node may see it so, and rank 0 prints for all.
    if rank and env["LOCAL_RANK"] == "0" and not means_every_machine(env["MASTER_ADDR"]):
        print(f"error: {line}", file=sys.stderr, flush=True)
    raise UserError(line)


def address_mistake(first_node: bool) -> str | None:
    """Why the nodes of a run on several do not meet at MASTER_ADDR; None if they do, or may.

    Args:
        first_node: whether rank 0 runs on this node.
    """
    line = _unreachable(os.environ["MASTER_ADDR"], first_node)
    nodes = os.environ.get("SLURM_STEP_NODELIST")
    if line is not None and nodes:
        try:  # several nodes of Slurm may be one machine, where a loopback address is right
            if means_every_machine(_node_address(_first_node(nodes))):
                return None
        except (OSError, subprocess.CalledProcessError, IndexError):
            pass
    return line


def _unreachable(address: str, first_node: bool) -> str | None:
    """Why other nodes do not meet rank 0 at this address; None if this node sees no reason.

    The first node's own name may be a loopback address there, as on Debian.
    """
    given, node = f"MASTER_ADDR is {address!r}", this_node()
    remedy = (
        "set it to the first node's name or address, as all nodes see it, or under Slurm unset it"
    )
    if means_every_machine(address):
        return (
            f"{given}, by which every node means itself, and this run has several nodes: {remedy}"
        )
    if first_node and address.split(".")[0] in (node, socket.gethostname().split(".")[0]):
        return None
    try:
        addresses = [str(entry[4][0]) for entry in socket.getaddrinfo(address, None)]
    except socket.gaierror as error:
        if error.errno != socket.EAI_NONAME:  # the name server may answer later
            return None
        return f"{given}, a name that node {node} does not know: {remedy}"
    if all(map(_is_own, addresses)):
        return f"{given}, which on node {node} is {addresses[0]}, the node itself: {remedy}"
    return None


def means_every_machine(address: str) -> bool:
    """Whether the address is one by which every machine means itself."""
    name = address.strip("[]")
    return name.lower() == "localhost" or _is_own(name)


def _is_own(address: str) -> bool:
    """Whether this is an IP address of the loopback network, or that of no machine."""
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    parsed = getattr(parsed, "ipv4_mapped", None) or parsed
    return parsed.is_loopback or parsed.is_unspecified


def this_node() -> str:
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def _slurm_address(nodes: str) -> str:
    """The address of the first node of a Slurm node list, on which rank 0 runs.

    Raises:
        UserError: `scontrol` is not installed (as inside a container), or does not know the node.
    """
    try:
        first = _first_node(nodes)
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


def _first_node(nodes: str) -> str:
    return _scontrol("show", "hostnames", nodes).split()[0]


def _node_address(node: str) -> str:
    return _scontrol("show", "node", node).split("NodeAddr=", 1)[1].split()[0]


def _scontrol(*arguments: str) -> str:
    return subprocess.check_output(["scontrol", *arguments], stderr=subprocess.DEVNULL, text=True)


def slurm_ports() -> list[int]:
    """Candidate ports of a Slurm job's step, in the order to try; none is ephemeral (>= 32768)."""
    number = int(os.environ["SLURM_JOB_ID"]) + 1009 * int(os.environ["SLURM_STEP_ID"])
    return [12000 + (number + 2003 * i) % 20000 for i in range(8)]


def is_slurm_step() -> bool:
    """Whether the ranks of this run are the tasks of one `srun` step."""
    env = os.environ
    return (
        "SLURM_STEP_ID" in env
        and env.get("SLURM_PROCID") == env["RANK"]
        and env.get("SLURM_STEP_NUM_TASKS") == env["WORLD_SIZE"]
    )
