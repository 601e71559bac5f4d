"""Programs as processes of their own, and functions on several ranks over gloo: each with a limit of time."""

import multiprocessing
import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from contextlib import contextmanager, nullcontext, suppress
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
LATE = "deepspeed.runtime.zero.muon.muon_optimizer"  # what an engine would import: all that torch.compile is
_pools: list[ProcessPoolExecutor] = []  # one process for each rank
_ports = iter(random.SystemRandom().sample(range(20000, 32000), 12000))  # each once, for jobs that start together
ALONE = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_PORT": "0"}  # the environment of an only rank


def free_port() -> int:
    """Return a port below those that the system hands out by itself, 32768 and up: nobody gets it before its use."""
    while True:
        port = next(_ports)
        with socket.socket() as s, suppress(OSError):
            s.bind(("127.0.0.1", port))
            return port


def clean_environment() -> dict[str, str]:
    """Return this process's environment without a launcher's variables."""
    return {k: v for k, v in os.environ.items() if k not in LAUNCHER_VARIABLES}


def environments(world: int, **more: str) -> list[dict[str, str]]:
    """Return the environment of each rank's process on this machine, as a launcher would set it, and `more`."""
    env = clean_environment() | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    env |= {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), **more}
    return [env | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world)]


def start(argv: Sequence[object], env: dict[str, str], output: Path) -> subprocess.Popen:
    """Start `python ARGV`. Its output and errors are added to the file `output`."""
    with open(output, "ab") as out:
        return subprocess.Popen([sys.executable, *map(str, argv)], env=env, cwd=ROOT, stdout=out, stderr=out)


def start_ranks(argv: Sequence[object], outputs: Sequence[Path], **more: str) -> list[subprocess.Popen]:
    """Start `python ARGV` on as many ranks as there are `outputs`, as a scheduler does."""
    return [start(argv, env, output) for env, output in zip(environments(len(outputs), **more), outputs, strict=True)]


def launcher(name: str, ranks: int) -> list[str]:
    """Return the command `deepspeed` or `torchrun` for a number of ranks."""
    number = {"deepspeed": "--num_accelerators", "torchrun": "--nproc_per_node"}[name]
    return [str(Path(sys.executable).with_name(name)), number, str(ranks), "--master_port", str(free_port())]


def poll(
    condition: Callable[[], object], seconds: float, message: Callable[[], str] = str, interval: float = 0.02
) -> None:
    """Wait until `condition()` holds. Fail with `message()` after `seconds`."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not yet after {seconds} s:\n{message()}"
        time.sleep(interval)


def wait_for(condition: Callable[[], object], process: subprocess.Popen, log: Path, seconds: float = 240) -> None:
    """Wait until `condition()` holds. Fail if the process ends before, or after `seconds`."""
    poll(lambda: condition() or process.poll() is not None, seconds, log.read_text)
    assert condition(), f"it has ended with {process.returncode}:\n{log.read_text()}"


def python(
    *argv: object, launcher: Sequence[str] = (sys.executable,), env: dict[str, str] | None = None, timeout: float = 300
) -> subprocess.CompletedProcess:
    """Run `python ARGV`, or `LAUNCHER ARGV`, to its end in the project's folder."""
    command = [*launcher, *map(str, argv)]
    if env is None:
        env = clean_environment()
    return subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=timeout)


def forkserver() -> ForkServerContext:
    """Return the context whose server imports the libraries once for all processes."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # as a training sets it before it imports PyTorch
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.drive_train", "tests.make", LATE])
    return context


def start_function(
    function: Callable, world: int, output: Path, *arguments: object, **env: str
) -> list[ForkServerProcess]:
    """Start `function(rank, *arguments)` of each rank in a process of its own, which writes to the file `output`."""
    processes = []
    for rank, environment in enumerate(environments(world, **env)):
        call = (environment, output, function, rank, arguments)
        processes.append(forkserver().Process(target=_in_process, args=call))
        processes[-1].start()
    return processes


def _in_process(env: dict[str, str], output: Path, function: Callable, rank: int, arguments: tuple) -> None:
    import torch

    os.environ.clear()
    os.environ.update(env)
    torch.set_num_threads(1)
    with open(output, "ab", buffering=0) as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    function(rank, *arguments)


@contextmanager
def training_ranks(arguments: Sequence[object], log: Path) -> Iterator[list[ForkServerProcess]]:
    """Start a training on two ranks, and wait for its fifth step. Kill it at the end."""
    log.touch()
    processes = start_function(_train, 2, log, [*map(str, arguments)])
    try:
        poll(lambda: "step 5/" in log.read_text() or not processes[0].is_alive(), 240, log.read_text)
        yield processes
    finally:
        for process in processes:
            process.kill()


def _train(rank: int, arguments: list[str]) -> None:
    from ds_cmli import commands, train

    sys.argv = ["train.py", *arguments]
    commands.run_command(train.command)


def run(function: Callable, world: int, *arguments: object, group: bool = True, timeout: float = 300) -> list[Any]:
    """Call `function(rank, world, *arguments)` on each rank of a process group, and return the results in rank order.

    Without `group` the ranks have a launcher's variables alone. The processes stay for the next call. If a rank fails,
    or takes longer than `timeout` seconds, all processes are ended.
    """
    _pools.extend(ProcessPoolExecutor(1, forkserver()) for _ in range(len(_pools), world))
    call = (world, function, arguments, group)
    jobs = [_pools[rank].submit(_rank, env, rank, *call) for rank, env in enumerate(environments(world))]
    wait(jobs, timeout, FIRST_EXCEPTION)
    late = [rank for rank, job in enumerate(jobs) if not job.done()]
    if late or any(job.exception() for job in jobs):
        for process in multiprocessing.active_children():
            process.kill()
        for pool in _pools:
            pool.shutdown()
        _pools.clear()
    for rank, job in enumerate(jobs):
        if rank not in late:
            job.result()  # raises what the rank has raised
    assert not late, f"ranks {late} are not done in {timeout} s"
    return [job.result() for job in jobs]


def _rank(env: dict[str, str], rank: int, world: int, function: Callable, arguments: tuple, group: bool) -> Any:
    import torch
    import torch.distributed as dist
    import torch.nn.functional as F

    from ds_cmli.distributed import process_group

    linear = F.linear  # ZeRO-3 replaces it for good; gradients would be reduced in another order than on a new rank
    os.environ.clear()
    os.environ.update(env)
    torch.set_num_threads(1)
    if "deepspeed" in sys.modules:
        from tests.drive_train import another_rank as scope
    else:
        scope = nullcontext
    if group:
        dist.init_process_group("gloo", rank=rank, world_size=world)
    try:
        with scope():
            return function(rank, world, *arguments)
    finally:
        F.linear = linear
        process_group.shutdown()
