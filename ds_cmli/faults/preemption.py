"""A signal only sets a flag: the loop finishes its step, all ranks save together, and the process ends with code 85.

TERM, USR1, USR2, INT and HUP, whichever a scheduler sends, are taken alike, and so is the end of the launcher. A second
INT stops at once.
Nothing heavy is imported here: a signal that comes before `install` kills the process, so it must stand at its start.
"""

import atexit
import multiprocessing.util
import os
import signal
import threading
import time
from types import FrameType

from ds_cmli.faults import launcher

EXIT_CODE = 85  # of a run that saved and wants to be started again
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT, signal.SIGHUP)
SAME_PRESS = 1.0  # seconds; one Ctrl-C reaches a rank from the terminal and once more from its launcher

_received: list[str] = []


class Preempted(Exception):
    """Raised to leave what must not be finished first: on all ranks together, once they have met."""


def install() -> None:
    """Take the signals from here on. Main thread only."""
    for number in SIGNALS:
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup has it ignored
            signal.signal(number, _note)
    # Python runs its handlers between two instructions, never while a rank waits in a collective for one that hangs.
    # The bytes that the C handler writes here reach a thread that needs no other.
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    threading.Thread(target=_stop_at_second_int, args=(reader,), daemon=True).start()
    launcher.watch(lambda: _received.append("the end of its launcher"))
    os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))
    # After multiprocessing's own, and so called before it, which would wait for shielded processes for ever.
    atexit.register(_end_loaders)


def shield(worker: int) -> None:
    """For a data loading process: schedulers signal it too, and a rank cannot finish its step without its data."""
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)


def _end_loaders() -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's handler would report them as lost
    for process in multiprocessing.active_children():
        process.kill()


def _note(number: int, frame: FrameType | None) -> None:
    _received.append(signal.Signals(number).name)


def _stop_at_second_int(reader: int) -> None:
    first: float | None = None
    while True:
        for number in os.read(reader, 64):
            if number == signal.SIGINT:
                now = time.monotonic()
                first = first or now
                if now - first > SAME_PRESS:
                    os._exit(128 + signal.SIGINT)


def requested() -> str | None:
    """What asked for an end first, a signal by its name; None before."""
    return _received[0] if _received else None


def stop() -> None:
    """Raises `Preempted` where an end was asked for. On this rank alone."""
    if _received:
        raise Preempted
