"""The ranks of a run: as which of them a launcher has started this process; torch is not needed."""

import os
import socket
import subprocess

from ds_cmli.errors import UserError, blame

# Variables that launchers set for a rank. A process that is no rank is started without them.
RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def map_launcher_environment() -> None:
    """Set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT where no launcher has.

    `deepspeed` and `torchrun` set them. For a task of `srun` they are computed from its SLURM_*
    variables, and a plain `python` process is a world of one. GPUs are hidden if DS_ACCELERATOR is
    cpu. Raises `UserError` if a variable is missing or not a number, or RANK not below WORLD_SIZE.
    """
    env = os.environ
    tasks = env.get("SLURM_STEP_NUM_TASKS") or env.get("SLURM_NTASKS", "1")
    if "SLURM_STEP_ID" in env and "RANK" not in env and tasks != "1":
        with blame("SLURM_STEP_ID is set: start it by srun, or set RANK and WORLD_SIZE"):
            env["WORLD_SIZE"] = tasks
            env["LOCAL_RANK"] = env["SLURM_LOCALID"]
            # With --gpus-per-task, Slurm shows each task its own GPU alone: number 0.
            if "," not in env.get("CUDA_VISIBLE_DEVICES", ","):
                env["LOCAL_RANK"] = "0"
            if "MASTER_ADDR" not in env:  # the first node's, on which rank 0 runs
                first_node = _scontrol("hostnames", env["SLURM_STEP_NODELIST"]).split()[0]
                address = _scontrol("node", first_node).split("NodeAddr=", 1)[1]
                env["MASTER_ADDR"] = address.split()[0]
            number = int(env["SLURM_JOB_ID"]) + 1009 * int(env["SLURM_STEP_ID"])
            env.setdefault("MASTER_PORT", str(12000 + number % 20000))  # below the ephemeral ones
            env["RANK"] = env["SLURM_PROCID"]
    if env.get("WORLD_SIZE", "1") == "1":
        env.setdefault("RANK", "0")
    for name, value in zip(RANK_VARIABLES[1:], ("1", "0", "127.0.0.1", "29500"), strict=True):
        env.setdefault(name, value)
    if env.get("DS_ACCELERATOR") == "cpu":
        env["CUDA_VISIBLE_DEVICES"] = ""  # the launcher of DeepSpeed sets it on CPUs, too
    with blame("RANK, WORLD_SIZE and LOCAL_RANK"):
        rank = int(env["RANK"])
        num_ranks = int(env["WORLD_SIZE"])
        int(env["LOCAL_RANK"])
    if not 0 <= rank < num_ranks:
        ranks = f"0 to {num_ranks - 1}"
        raise UserError(f"RANK is {rank} and WORLD_SIZE is {num_ranks}: the ranks are {ranks}")


def _scontrol(*arguments: str) -> str:
    return subprocess.check_output(["scontrol", "show", *arguments], text=True)


def this_node() -> str:
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()
