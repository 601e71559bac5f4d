"""Runs a program by the CUDA build of PyTorch on the null GPU, which the repository brings.

What it takes is what PyTorch's own allocator counts (`counting.py`), not a model of it.
"""

import json
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from ds_cmli.allocator import gpus
from ds_cmli.common.errors import UserError
from ds_cmli.fits.answer import WITHOUT_LIMIT, Room
from ds_cmli.fits.report import (
    check_training,
    not_counted,
    show_totals,
    verdict,
    what_ran,
)
from ds_cmli.fits.world import World

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "tests" / "null_gpu"
NOT_COUNTED = (
    "not counted: cuDNN's workspaces and its attention, in whose place is PyTorch's own, and "
    "what depends on computed values, which are 0 there"
)


@dataclass(frozen=True)
class Counted:
    """What PyTorch's allocator has counted of one rank: peaks in bytes."""

    requested: int
    allocated: int
    reserved: int
    steps: int  # optimizer steps that were done
    ending: list[str]  # lines on what the program did not do until then
    waited_for: list[str]  # optimizers that had done none by then
    full: bool  # whether the device had too little memory
    retries: int  # of the allocator, which then returned its cache for lack of room
    written: str  # the line about files, or ""


@dataclass(frozen=True)
class NullGpu:
    """Null GPUs for the ranks of a world, each alone on its machine."""

    room: Room
    steps: int
    world: World

    @property
    def outside(self) -> int:
        """Bytes of the device that are not those of PyTorch's allocator."""
        return gpus.device_bytes(0, self.room.gpu, self.world.size or 1)

    @cached_property
    def environment(self) -> dict[str, str]:
        """The environment of a process; the null GPU is built first, where it is not there.

        Raises `UserError` if it cannot be.
        """
        card = self.room.gpu.lower().removeprefix("rtx ").split()[0]
        if not SOURCES.is_dir():
            raise UserError(
                "--engine null needs the null GPU, which is not part of the installed package: "
                "clone the repository, and install it from there (pip install -e .)"
            )
        command = [sys.executable, "-m", "tests.null_gpu.environment", card]
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            raise UserError(f"--engine null: no null GPU can be built: {done.stdout.strip()}")
        return json.loads(done.stdout)

    def run(self, program: Sequence[str], memory: int, snapshot: str | None) -> Counted:
        """Run the program's ranks on devices of `memory` bytes, until one lacks memory.

        Args:
            snapshot: a file for the allocator's history.

        Raises:
            SystemExit: the program has ended by itself, with this code.
        """
        device = {"NULLGPU_MEMORY": str(memory), "NULLGPU_CONTEXT": str(self.outside)}
        env = self.environment | device | _launcher(self.world)
        with tempfile.TemporaryDirectory() as folder:
            processes, answers = [], []
            for rank in range(self.world.size or 1):
                answers.append(Path(folder) / f"{rank}.json")
                is_own = rank == self.world.rank
                files = [str(answers[rank]), (snapshot or "") if is_own else ""]
                command = [sys.executable, "-m", "ds_cmli.fits.counting", str(self.steps), *files]
                out = None if is_own else subprocess.DEVNULL
                if self.world.size is not None:
                    env |= {"RANK": str(rank), "GROUP_RANK": str(rank)}
                processes.append(subprocess.Popen([*command, *program], env=env, stdout=out))
            code = _first_failure(processes)
            counted = [Counted(**json.loads(path.read_text())) for path in answers if path.exists()]
        full = next((process for process in counted if process.full), None)
        if code and not full:
            raise SystemExit(code)
        return full or counted[self.world.rank]


def _launcher(world: World) -> dict[str, str]:
    """What a launcher sets for all ranks of a world that is on this machine."""
    if world.size is None:
        return {}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    variables = {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "WORLD_SIZE": str(world.size)}
    return variables | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def _first_failure(processes: list[subprocess.Popen]) -> int:
    """Wait for all processes, but end the others where one has failed; return its exit code."""
    try:
        while any(process.poll() is None for process in processes):
            if any(process.returncode for process in processes):
                break
            time.sleep(0.05)
        return next(filter(None, (process.returncode for process in processes)), 0)
    finally:
        for process in processes:
            process.kill()
            process.wait()


@dataclass(frozen=True)
class NullGpuAnswer:
    """What a program takes of one device."""

    asked: NullGpu
    counted: Counted
    enough: bool  # whether the device had enough memory

    @property
    def fits(self) -> bool:
        """Whether the program is known to fit."""
        return self.enough and not self.counted.waited_for

    @property
    def totals(self) -> dict[str, int]:
        """Peaks in bytes: "requested", "allocated", "reserved", "device"."""
        counted = self.counted
        kinds = {"requested": counted.requested, "allocated": counted.allocated}
        device = counted.reserved + self.asked.outside
        return kinds | {"reserved": counted.reserved, "device": device}

    def show(self, program: str) -> None:
        ran = what_ran(program, self.counted.steps, self.asked.world)
        answer = verdict(self.asked.room, self.totals["device"], self.enough, self.counted.retries)
        print(f"{ran} {answer}{not_counted(self.counted.waited_for)}")
        show_totals(self.totals, self.asked.room, self.asked.world)
        lines = *self.counted.ending, NOT_COUNTED, self.counted.written
        print("", *filter(None, lines), sep="\n")

    def to_dict(self) -> dict[str, object]:
        counted = {"steps": self.counted.steps, "waited_for": self.counted.waited_for}
        name = str(self.asked.room)
        fits = {"fits": {name: self.enough}, "retries": {name: self.counted.retries}}
        return {**counted, "totals": self.totals, **fits}


def answer(null_gpu: NullGpu, program: Sequence[str], snapshot: str | None) -> NullGpuAnswer:
    """Run the program, and again without a limit where the device has too little memory.

    Raises:
        UserError: there is no null GPU, or the program does not train on it.
        SystemExit: the program has ended by itself, with this code.
    """
    counted = null_gpu.run(program, null_gpu.room.bytes, snapshot)
    fits = not counted.full
    if not fits:
        counted = null_gpu.run(program, WITHOUT_LIMIT, snapshot)
    check_training(counted.steps, counted.reserved > 0)
    return NullGpuAnswer(null_gpu, counted, fits)
