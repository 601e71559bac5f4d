"""The command that stands for Python: its streams, environment, exit codes and signals are those of what it forks."""

import signal
import subprocess
import sys

import pytest

from tests.processes import python

PROGRAM = """
import os, signal, sys
print("torch" in sys.modules, sys.argv[1:], os.environ["A"], os.getcwd(), sys.stdin.readline(), flush=True)
print("an error", file=sys.stderr, flush=True)
if sys.argv[1] == "told":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(85))
if sys.argv[1] != "ends":
    print(os.getpid(), flush=True)
    signal.pause()
sys.exit(7)
"""


@pytest.fixture
def start(tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)

    def started(*arguments):
        command = [python(), "-u", str(tmp_path / "program.py"), *arguments]
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        process = subprocess.Popen(command, env={"A": "b"}, cwd="/", text=True, **pipes)
        process.stdin.write("said\n")
        process.stdin.flush()
        return process

    return started


def test_it_is_as_the_program(start):
    process = start("ends", "a b")
    out, errors = process.communicate(timeout=60)
    assert out == "True ['ends', 'a b'] b / said\n\n" and errors == "an error\n"
    assert process.returncode == 7


@pytest.mark.parametrize(
    ("does", "number", "code"),
    [("told", signal.SIGTERM, 85), ("stays", signal.SIGUSR1, -10), ("stays", signal.SIGKILL, -9)],
)
def test_signals_reach_the_program(does, number, code, start):
    process = start(does)
    other = int([process.stdout.readline() for _ in range(3)][-1])
    assert other != process.pid
    process.send_signal(number)
    assert process.stdout.read() == "" and process.wait(60) == code  # both ends are closed


def test_code_is_for_python_itself():
    done = subprocess.run([python(), "-c", "import sys; print(sys.executable)"], capture_output=True, text=True)
    assert done.stdout == f"{sys.executable}\n"
