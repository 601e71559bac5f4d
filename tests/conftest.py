import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "2")
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session", autouse=True)
def pictures():
    """The demo's pictures, fetched once for the whole session: the only download of the test suite."""
    from ds_cmli.data import assets

    assets.fetch(["pictures"])


def run(*arguments: str, launcher: tuple[str, ...] = (), timeout: float = 300, **environment: str):
    """Run `ds_cmli/train.py` as a user does, by its path, and return the finished process."""
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR")}
    env.update(environment)
    start = launcher or (sys.executable,)
    command = [*start, str(ROOT / "ds_cmli" / "train.py"), *arguments]
    return subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=timeout)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture
def train():
    return run


def spawn(function, world_size: int, *arguments) -> list:
    """Run `function(rank, world_size, *arguments)` in `world_size` gloo processes; their results in rank order."""
    import torch.multiprocessing as mp

    with mp.get_context("spawn").Manager() as manager:
        results = manager.dict()
        mp.spawn(_worker, (world_size, free_port(), function, arguments, results), nprocs=world_size)
        return [results[r] for r in range(world_size)]


def _worker(rank, world_size, port, function, arguments, results):
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size)
    try:
        results[rank] = function(rank, world_size, *arguments)
    finally:
        dist.destroy_process_group()
