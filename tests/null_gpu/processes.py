"""Python programs with null GPUs, forked from a server that has imported the libraries of the CUDA build."""

import subprocess
import tempfile
from functools import cache
from pathlib import Path

from tests.conftest import ROOT
from tests.null_gpu.build import build
from tests.null_gpu.environment import environment
from tests.processes import Program, Server, finished


@cache
def server() -> Server:
    return Server("tests.null_gpu.preload", environment(build()))


def start(env: dict[str, str], command: list[str], output: Path) -> Program:
    """What stands behind `python` in `command`, started with an environment of the fixture `null_gpu`."""
    return Program(command, env, ROOT, output, server=server())


def run(env: dict[str, str], *command: object, timeout: float = 600) -> subprocess.CompletedProcess:
    """The same, ended."""
    with tempfile.TemporaryDirectory() as folder:
        return finished([*map(str, command)], env, ROOT, Path(folder), timeout, server())
