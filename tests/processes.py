"""Python programs started as processes of their own, forked from a server that has imported the libraries.

It saves the seconds that PyTorch, DeepSpeed, transformers and timm take in each. What a program itself imports, and in
which order, is as in a fresh interpreter; tests of that, and of launchers, start real ones.

`python()` is a command that stands for Python and does the same for whoever starts programs by a command: Slurm,
torchrun, and the forked programs themselves. `worker()` does so for xdist, whose processes run the tests.
"""

import contextlib
import fcntl
import json
import multiprocessing
import multiprocessing.connection
import os
import runpy
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import types
from collections.abc import Iterator, Sequence
from functools import cache
from multiprocessing import forkserver, reduction, resource_tracker, util
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


class Files:
    """Standard output and standard error of a process: files, which get what is written at their end.

    Args:
        errors: None: the same file.
    """

    def __init__(self, output: Path, errors: Path | None):
        self.output, self.errors = str(output), errors and str(errors)

    def become(self) -> None:
        """In the process."""
        for number, path in ((1, self.output), (2, self.errors)):
            if path is None:
                os.dup2(1, number)
                continue
            file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(file, number)
            os.close(file)


class Descriptors:
    """Standard input, output and error of a process: descriptors of another one."""

    def __init__(self, numbers: Sequence[int]):
        self.numbers = numbers

    def __getstate__(self) -> dict:
        """What the process gets, while it is being started."""
        return {"numbers": [reduction.DupFd(number) for number in self.numbers]}

    def become(self) -> None:
        """In the process."""
        # Some may have come with the numbers that they or others shall have.
        files = [fcntl.fcntl(given.detach(), fcntl.F_DUPFD, 3) for given in self.numbers]
        for number, file in enumerate(files):
            os.dup2(file, number)
            os.close(file)
        sys.stdin = open(0, closefd=False)  # noqa: SIM115


class Program:
    """Like `subprocess.Popen`, of `python SCRIPT ARGUMENTS`.

    Args:
        command: the script's path, or "-m" and a module, and its arguments.
        env: the whole environment.
        output: the file for standard output; or all three streams.
        errors: the file for standard error; None: the same.
        server: where it is forked; None: from the usual server.
    """

    def __init__(
        self,
        command: list[str],
        env: dict[str, str],
        cwd: Path,
        output: Path | Descriptors,
        errors: Path | None = None,
        server: Server | None = None,
    ):
        streams = output if isinstance(output, Descriptors) else Files(output, errors)
        # The libraries of another server are not those of `python()`.
        executable = sys.executable if server else python()
        arguments = (list(map(str, command)), env, str(cwd), streams, executable)
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


def _run(command: list[str], env: dict[str, str], cwd: str, streams: Files | Descriptors, executable: str) -> None:
    streams.become()
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    sys.path[:0] = filter(None, env.get("PYTHONPATH", "").split(os.pathsep))
    time.tzset()
    # How a fresh interpreter starts processes: one from the server would start them as it was started itself.
    multiprocessing.set_start_method(None, force=True)
    if command[0] == "-c":
        _run_tests(command[1])
        return
    sys.executable = executable
    if command[0] == "-m":
        sys.argv = command[1:]
        sys.path.insert(0, cwd)
        runpy.run_module(command[1], run_name="__main__", alter_sys=True)
        return
    sys.argv = command
    if not os.path.isdir(command[0]):  # where it is, `run_path` adds it
        sys.path.insert(0, os.path.dirname(command[0]))
    runpy.run_path(command[0], run_name="__main__")


def _run_tests(code: str) -> None:
    """Be one of the processes in which xdist runs tests; what it forks comes from the server that it comes from."""
    forkserver._forkserver.ensure_running = resource_tracker.ensure_running
    sys.modules["__main__"] = types.ModuleType("__main__")
    exec(code, vars(sys.modules["__main__"]))


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


@cache
def python() -> str:
    """The path of a command that runs Python programs, forked from the usual server, for those who start processes.

    `forked_python.py` tells what the process that is started so has in common with the one that runs.
    """
    folder = tempfile.mkdtemp(prefix="python-")
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(f"{folder}/socket")
    listening.listen()
    threading.Thread(target=_listen, args=(listening,), daemon=True).start()
    path = Path(folder, "python")
    forked = shlex.join([sys.executable, "-IS", str(Path(__file__).with_name("forked_python.py")), f"{folder}/socket"])
    # What is no program of ours, a line of code for instance, is for Python itself.
    path.write_text(f"""\
#!/bin/sh
[ "$1" = -u ] && shift
case $1 in
-m | [!-]*) exec {forked} "$@" ;;
*) exec {shlex.quote(sys.executable)} "$@" ;;
esac
""")
    for_tests = path.with_name("worker")
    for_tests.write_text(f'#!/bin/sh\n[ "$1" = -u ] && shift\nexec {forked} "$@"\n')
    for file in (path, for_tests):
        file.chmod(0o755)

    def end() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        for program in SERVED:  # otherwise they would be waited for
            program.kill()

    util.Finalize(None, end, exitpriority=0)  # also where this process is a forked one, which leaves out `atexit`
    return str(path)


def worker() -> str:
    """The path of a command for xdist that does the same with the code of its processes, which run tests."""
    return str(Path(python()).with_name("worker"))


SERVED: set[Program] = set()


def _listen(listening: socket.socket) -> None:
    while True:
        threading.Thread(target=_serve, args=(listening.accept()[0],), daemon=True).start()


def _serve(connection: socket.socket) -> None:
    """Run what a process of forked_python.py asks for, as long as that lives."""
    with connection, connection.makefile("rb") as lines:
        _, streams, _, _ = socket.recv_fds(connection, 1, 3)
        content = json.loads(lines.readline())
        program = Program(content["command"], content["env"], content["cwd"], Descriptors(streams))
        SERVED.add(program)
        for stream in streams:
            os.close(stream)
        with contextlib.suppress(BrokenPipeError):
            connection.sendall(f"{program.pid}\n".encode())
            multiprocessing.connection.wait([program.process.sentinel, connection])
            program.kill()  # where the other one has been killed
            code = program.wait()
            SERVED.discard(program)
            connection.sendall(f"{code}\n".encode())
