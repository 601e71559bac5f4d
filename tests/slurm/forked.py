"""Stands for Python in a Slurm job, and saves the seconds of its imports: `python -IS forked.py SOCKET SCRIPT ...`

The tests' process has the script forked from its server with the libraries loaded (tests/processes.py), in this
process's environment and folder, and with its output. Slurm sees this process alone: signals are passed on, and the
forked one is stopped and killed when this one is.
"""

import json
import os
import signal
import socket
import socketserver
import sys
import time
from pathlib import Path

PASSED_ON = (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


class Forks(socketserver.StreamRequestHandler):
    """Forks what one job's process asks for, and watches that process."""

    def handle(self) -> None:
        from tests.processes import Program

        command, env, cwd, asking = json.loads(self.rfile.readline())
        files = Path("/proc", str(asking), "fd")
        program = Program(command, env, Path(cwd), files / "1", files / "2")
        self.wfile.write(b"%d\n" % program.pid)
        stopped = False
        while program.poll() is None:
            state = _state(asking)
            if state in ("", "Z", "X"):
                program.kill()
            elif (state == "T") != stopped:
                stopped = not stopped
                program.send_signal(signal.SIGSTOP if stopped else signal.SIGCONT)
            time.sleep(0.02)
        if _state(asking):
            self.wfile.write(b"%d\n" % program.returncode)


def _state(pid: int) -> str:
    """That of a process in /proc; empty where there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


def main() -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(sys.argv[1])
        answers = server.makefile()
        server.sendall(json.dumps([sys.argv[2:], dict(os.environ), os.getcwd(), os.getpid()]).encode() + b"\n")
        pid = int(answers.readline())
        for number in PASSED_ON:
            signal.signal(number, lambda number, _: os.kill(pid, number))
        code = int(answers.readline())
    os._exit(128 - code if code < 0 else code)  # of a signal as a shell tells it


if __name__ == "__main__":
    main()
