"""A process that stands for another one, which `processes.python()` forks: `python -IS forked_python.py SOCKET COMMAND`

The other one has its environment, folder, standard streams and, as far as they can be caught, signals; this one ends as
the other does, and the other is killed where this one is. Parents, groups of processes and sessions differ.
"""

import json
import os
import signal
import socket
import sys

CAUGHT = {*signal.valid_signals()} - {signal.SIGKILL, signal.SIGSTOP, signal.SIGCHLD, signal.SIGPIPE}


def main(path: str, *command: str) -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, CAUGHT)  # until there is a process to pass them on to
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(path)
    socket.send_fds(connection, [b" "], [0, 1, 2])
    request = {"command": command, "env": dict(os.environ), "cwd": os.getcwd()}
    connection.sendall(json.dumps(request).encode() + b"\n")
    lines = connection.makefile("rb")
    pid = int(lines.readline())
    for number in CAUGHT:
        signal.signal(number, lambda number, frame: os.kill(pid, number))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, CAUGHT)
    code = int(lines.readline() or -signal.SIGKILL)
    if code < 0:
        signal.signal(-code, signal.SIG_DFL) if -code in CAUGHT else None
        os.kill(os.getpid(), -code)
    os._exit(code)


if __name__ == "__main__":
    main(*sys.argv[1:])
