"""Python programs started as processes of their own, forked from a server that has imported the libraries.

It saves the seconds that PyTorch, DeepSpeed, transformers and timm take in each. What a program itself imports, and in
which order, is as in a fresh interpreter; tests of that, and of launchers, start real ones.
"""

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import runpy
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from multiprocessing import forkserver
from pathlib import Path
from unittest import mock

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.preload"])
# The exit code comes through a pipe: of two threads that read it, as each start does too, one would find it empty.
LOCK = threading.Lock()


class Server:
    """A server beside the usual one, for what counts where a process begins: libraries that it finds, and what comes
    before the imports.

    Args:
        preload: a module that imports what its processes share.
        env: the server's whole environment.
    """

    def __init__(self, preload: str, env: dict[str, str]):
        self.server, self.env = forkserver.ForkServer(), env
        self.server.set_forkserver_preload([preload])

    @contextlib.contextmanager
    def serving(self) -> Iterator[None]:
        """Inside, a process that is started comes from this server, which begins with the first."""
        with (
            mock.patch.dict(os.environ, self.env, clear=True),
            mock.patch.object(forkserver, "connect_to_new_process", self.server.connect_to_new_process),
        ):
            yield


class Program:
    """Like `subprocess.Popen`, of `python SCRIPT ARGUMENTS`, whose output goes to a file.

    Args:
        command: the script's path, or "-m" and a module, and its arguments.
        env: the whole environment.
        output: the file for standard output.
        errors: the file for standard error; None: the same.
        server: where it is forked; None: from the usual server.
    """

    def __init__(
        self,
        command: list[str],
        env: dict[str, str],
        cwd: Path,
        output: Path,
        errors: Path | None = None,
        server: Server | None = None,
    ):
        arguments = (list(map(str, command)), env, str(cwd), str(output), errors and str(errors))
        self.process = CONTEXT.Process(target=_run, args=arguments)
        with LOCK, server.serving() if server else contextlib.nullcontext():
            self.process.start()
        self.pid = self.process.pid

    @property
    def returncode(self) -> int | None:
        with LOCK:
            return self.process.exitcode

    poll = returncode.fget

    def wait(self, timeout: float | None = None) -> int:
        multiprocessing.connection.wait([self.process.sentinel], timeout)
        code = self.returncode
        if code is None:
            raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0)
        return code

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _run(command: list[str], env: dict[str, str], cwd: str, output: str, errors: str | None) -> None:
    for number, path in ((1, output), (2, errors)):
        if path is None:
            os.dup2(1, number)
            continue
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    sys.path[:0] = filter(None, env.get("PYTHONPATH", "").split(os.pathsep))
    time.tzset()
    # How a fresh interpreter starts processes: one from the server would start them as it was started itself.
    multiprocessing.set_start_method(None, force=True)
    if command[0] == "-m":
        sys.argv = command[1:]
        sys.path.insert(0, cwd)
        runpy.run_module(command[1], run_name="__main__", alter_sys=True)
        return
    sys.argv = command
    if not os.path.isdir(command[0]):  # where it is, `run_path` adds it
        sys.path.insert(0, os.path.dirname(command[0]))
    runpy.run_path(command[0], run_name="__main__")


def finished(
    command: list[str], env: dict[str, str], cwd: Path, folder: Path, timeout: float, server: Server | None = None
):
    """Run a program to its end, as `subprocess.run` does with `capture_output`."""
    output, errors = folder / "stdout", folder / "stderr"
    for file in (output, errors):
        file.write_text("")
    program = Program(command, env, cwd, output, errors, server)
    try:
        code = program.wait(timeout)
    finally:
        program.kill()
    return subprocess.CompletedProcess(command, code, output.read_text(), errors.read_text())
