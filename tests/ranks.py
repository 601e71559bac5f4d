"""Functions and commands on several ranks of this machine, over gloo, with a limit of time."""

import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def free_port() -> int:
    """Below the ports that the system hands out by itself: nobody is given it between now and its use."""
    while True:
        port = random.SystemRandom().randrange(20000, 32000)
        with socket.socket() as s, suppress(OSError):
            s.bind(("127.0.0.1", port))
            return port


def environments(world: int, **more: str) -> list[dict[str, str]]:
    """The environment of each rank's process, as a launcher would set it."""
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **more}
    env |= {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [env | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world)]


def run(function: Callable, world: int, *arguments: object, group: bool = True, timeout: float = 300) -> list:
    """`function(rank, world, *arguments)` of each rank of a process group; what they return, in rank order.

    Without `group` they have a launcher's variables alone.
    """
    import torch.multiprocessing as mp

    context = mp.get_context("forkserver")
    # What this process has imported, its ranks will.
    context.set_forkserver_preload(["ds_cmli.engine"] if "deepspeed" in sys.modules else ["torch"])
    results, port = context.SimpleQueue(), free_port()
    started = mp.start_processes(
        _rank, (world, port, function, arguments, results, group), nprocs=world, join=False, start_method="forkserver"
    )
    end, found = time.monotonic() + timeout, {}
    try:
        while len(found) < world or not started.join(0.05):  # raises what a rank has raised
            while not results.empty():
                found.update([results.get()])
            if len(found) < world:
                started.join(0.05)
            assert time.monotonic() < end, f"ranks {set(range(world)) - set(found)} are not done in {timeout} s"
    finally:
        for process in started.processes:
            process.kill()
    return [found[rank] for rank in range(world)]


def _rank(rank: int, world: int, port: int, function: Callable, arguments: tuple, results, group: bool) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    if not group:
        results.put((rank, function(rank, world, *arguments)))
        return
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    try:
        results.put((rank, function(rank, world, *arguments)))
    finally:
        dist.destroy_process_group()


def commands(
    argv: list[str], world: int, cwd: str | Path = ROOT, timeout: float = 300
) -> list[subprocess.CompletedProcess]:
    """`python ARGV` on each rank, as a launcher starts it, in `cwd`, where {rank} is its number.

    Where one is late, the others are ended.
    """
    started, done = [], []
    for rank, env in enumerate(environments(world)):
        words = [word.replace("{rank}", str(rank)) for word in (*argv, str(cwd))]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen([sys.executable, *words[:-1]], env=env, cwd=words[-1], **pipes))
    end = time.monotonic() + timeout
    try:
        for process in started:
            out, err = process.communicate(timeout=max(1, end - time.monotonic()))
            done.append(subprocess.CompletedProcess(argv, process.returncode, out, err))
    finally:
        for process in started:
            process.kill()
    return done
