"""While training, a signal only sets a flag: the step is finished, all ranks save, exit code 85.

Schedulers differ in the signal they send, and the end of the launcher has the same effect. Before
training there is nothing to save, and a signal does what it does to any process.
"""

import atexit
import multiprocessing.util  # its exit function is called after `_end_loaders`
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import psutil

EXIT_CODE = 85  # the run has saved a checkpoint and is to be started again
SIGNALS = [signal.Signals[f"SIG{x}"] for x in ("TERM", "USR1", "USR2", "INT", "QUIT", "HUP")]
# Seconds; one Ctrl-C reaches a rank from the terminal and once more from its launcher.
SAME_PRESS = 1.0
INTERVAL = 0.5  # seconds between two looks for the launcher

_requests: list[tuple[str, float]] = []  # (signal or event, time.monotonic())


class Preempted(Exception):
    """Leaves work that need not be finished before the run ends; raised on all ranks together."""


def end_request() -> str | None:
    """Return the name of the first signal (or event) that asked the run to end, or None."""
    return _requests[0][0] if _requests else None


@contextmanager
def handle_signals() -> Iterator[None]:
    """Let signals inside ask the run to end; a second INT interrupts it as usual."""
    handlers = {}
    for number in SIGNALS if threading.current_thread() is threading.main_thread() else ():
        # Under nohup HUP stays ignored.
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            handlers[number] = signal.signal(number, _request_end)
    if "CROSS_RANK" in os.environ:
        num_launchers = 2  # `deepspeed`, and between it and its ranks a process that survives it
    elif "TORCHELASTIC_RUN_ID" in os.environ:
        num_launchers = 1  # `torchrun`
    else:
        num_launchers = 0  # `srun` ends its tasks itself.
    launchers = psutil.Process().parents()[:num_launchers]
    ended = threading.Event()
    threading.Thread(target=_watch_launcher, args=(launchers, ended), daemon=True).start()
    try:
        yield
    finally:
        ended.set()
        for number, handler in handlers.items():
            signal.signal(number, handler)
        _requests.clear()


def _request_end(number: int, frame: FrameType | None) -> None:
    name = signal.Signals(number).name
    other_press = time.monotonic() - SAME_PRESS  # a request before this time was another Ctrl-C
    if number == signal.SIGINT and any(n == name and at < other_press for n, at in _requests):
        raise KeyboardInterrupt
    _requests.append((name, time.monotonic()))


def _watch_launcher(launchers: list[psutil.Process], ended: threading.Event) -> None:
    """Ask the run to end when its launcher has ended: nobody else ends the ranks then."""
    while launchers and not ended.wait(INTERVAL):
        if psutil.Process().parents()[: len(launchers)] != launchers:
            _requests.append(("the end of its launcher", time.monotonic()))
            return


def block_signals(worker: int) -> None:
    """Block the signals in a data loading process: its rank still needs data for its last step."""
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)


def _end_loaders() -> None:
    """Kill the data loading processes: they block TERM, and multiprocessing would wait for ever."""
    # PyTorch's handler would report the killed processes as crashed.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()


atexit.register(_end_loaders)
