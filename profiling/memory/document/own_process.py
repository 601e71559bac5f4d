"""Starts a process for one piece of work and reads what it tells."""

import os
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext
from typing import Any


def tell_from_process(
    context: BaseContext, timeout_s: float, function: Callable, *arguments: Any
) -> list[Any]:
    """What `function(*arguments, say)` gives to `say`, in a process of its own that ends after `timeout_s` seconds."""
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_tell, args=(sender, function, arguments), daemon=True)  # type: ignore[attr-defined]
    process.start()
    sender.close()  # the process has the other copy, so that its end ends the pipe
    end, lines = time.monotonic() + timeout_s, []
    with suppress(EOFError):
        while receiver.poll(max(0.0, end - time.monotonic())):
            lines.append(receiver.recv())
    process.kill()
    process.join()
    return lines


def _tell(sender: Connection, function: Callable, arguments: tuple) -> None:
    nothing = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):  # what libraries print
        os.dup2(nothing, stream)
    function(*arguments, sender.send)
