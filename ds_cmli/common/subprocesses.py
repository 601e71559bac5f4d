"""Starts a Python process for one piece of work and reads the last JSON object that it prints."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext
from typing import Any

# Variables that launchers set for a rank. The processes started here are not ranks, so these are removed.
LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def environment(**more: str) -> dict[str, str]:
    """This process's environment variables without those that a launcher set, and with `more`."""
    return {k: v for k, v in os.environ.items() if k not in LAUNCHER_VARIABLES} | more


def ask(
    arguments: list[str], timeout_s: float, env: Mapping[str, str] | None = None
) -> tuple[dict[str, Any] | None, str]:
    """Run `python *arguments` for at most `timeout_s` seconds.

    Returns:
        The last JSON object that it printed, or None, and the reason why it failed, or "". A process that was ended by
        the time limit has an answer too, if it printed one before.
    """
    command = [sys.executable, *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env) as process:
        try:
            printed, errors = process.communicate(timeout=timeout_s)
            last = (errors.strip().splitlines() or ["no message"])[-1][:300]
            reason = f"exit code {process.returncode}: {last}" if process.returncode else ""
        except subprocess.TimeoutExpired:
            process.kill()
            printed, _ = process.communicate()
            reason = f"took more than {timeout_s:.0f} s"
    answers = [line for line in printed.splitlines() if line.startswith("{")]
    return (json.loads(answers[-1]) if answers else None), reason


def tell_from_process(context: BaseContext, timeout_s: float, function: Callable, *arguments: Any) -> list[Any]:
    """What `function(*arguments, say)` gives to `say`, in a process of its own that ends after `timeout_s` seconds."""
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_tell, args=(sender, function, arguments), daemon=True)  # type: ignore[attr-defined]
    process.start()
    sender.close()  # the process has the other copy, so that its end ends the pipe
    end, told = time.monotonic() + timeout_s, []
    with suppress(EOFError):
        while receiver.poll(max(0.0, end - time.monotonic())):
            told.append(receiver.recv())
    process.kill()
    process.join()
    return told


def _tell(sender: Connection, function: Callable, arguments: tuple) -> None:
    nothing = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):  # what libraries print
        os.dup2(nothing, stream)
    function(*arguments, sender.send)
