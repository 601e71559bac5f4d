"""Python programs started as processes of their own, forked from a server that has imported the libraries.

It saves the seconds that PyTorch, DeepSpeed, transformers and timm take in each. What a program itself imports, and in
which order, is as in a fresh interpreter; tests of that, and of launchers, start real ones.
"""

import multiprocessing
import multiprocessing.connection
import os
import runpy
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.preload"])
# The exit code comes through a pipe: of two threads that read it, as each start does too, one would find it empty.
LOCK = threading.Lock()


class Program:
    """Like `subprocess.Popen`, of `python SCRIPT ARGUMENTS`, whose output goes to a file.

    Args:
        command: the script's path and its arguments.
        env: the whole environment.
        output: the file for standard output.
        errors: the file for standard error; None: the same.
    """

    def __init__(self, command: list[str], env: dict[str, str], cwd: Path, output: Path, errors: Path | None = None):
        arguments = (list(map(str, command)), env, str(cwd), str(output), errors and str(errors))
        self.process = CONTEXT.Process(target=_run, args=arguments)
        with LOCK:
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
    sys.argv = command
    if not os.path.isdir(command[0]):  # where it is, `run_path` adds it
        sys.path.insert(0, os.path.dirname(command[0]))
    time.tzset()
    # How a fresh interpreter starts processes: one from the server would start them as it was started itself.
    multiprocessing.set_start_method(None, force=True)
    runpy.run_path(command[0], run_name="__main__")


def finished(command: list[str], env: dict[str, str], cwd: Path, folder: Path, timeout: float):
    """Run a program to its end, as `subprocess.run` does with `capture_output`."""
    output, errors = folder / "stdout", folder / "stderr"
    for file in (output, errors):
        file.write_text("")
    program = Program(command, env, cwd, output, errors)
    try:
        code = program.wait(timeout)
    finally:
        program.kill()
    return subprocess.CompletedProcess(command, code, output.read_text(), errors.read_text())
