"""A signal only sets a flag: the step is finished, all ranks save, and the exit code is 85.

TERM, USR1, USR2, INT, QUIT and HUP all have this effect, since schedulers differ in what they send,
and so has the end of the launcher. A second INT ends the process at once. This module imports
nothing heavy: a signal that arrives before `install` kills the process, so `install` is called
before everything else.
"""

import atexit
import multiprocessing.util
import os
import signal
import threading
import time
from types import FrameType

from ds_cmli.faults import launcher

EXIT_CODE = 85  # the run has saved a checkpoint and is to be started again
SIGNALS = (
    signal.SIGTERM,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGINT,
    signal.SIGQUIT,
    signal.SIGHUP,
)
# Environment variable of a script that tells by itself how the run goes on.
WHO_GOES_ON = "DS_CMLI_GOES_ON"
# Seconds; one Ctrl-C reaches a rank from the terminal and once more from its launcher.
SAME_PRESS = 1.0

_received: list[str] = []


class Preempted(Exception):
    """Leaves work that need not be finished before the run ends.

    It is raised on all ranks together, after they agreed.
    """


def install() -> None:
    """Handle the signals from now on. To be called in the main thread."""
    for number in SIGNALS:
        ignored = signal.getsignal(number) == signal.SIG_IGN
        if number != signal.SIGHUP or not ignored:  # under nohup HUP stays ignored
            signal.signal(number, _note)
    # Python calls its handlers between two bytecode instructions, so not while the main thread
    # waits in a collective for a rank that hangs. The C handler also writes the signal's number to
    # this pipe, which a second thread reads.
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    threading.Thread(target=_stop_at_second_int, args=(reader,), daemon=True).start()
    launcher.watch(lambda: _received.append("the end of its launcher"))
    os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))
    # Registered after multiprocessing's own exit function and so called before it: that one would
    # wait for ever for data loading processes that ignore TERM.
    atexit.register(_end_loaders)


def shield(worker: int) -> None:
    """Block the signals in a data loading process.

    Schedulers signal it too, and the rank still needs its data.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)


def _end_loaders() -> None:
    # PyTorch's handler would report the killed processes as crashed.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
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
    """The name of the first signal (or event) that asked the run to end; None if there was none."""
    return _received[0] if _received else None


def to_go_on(how: str) -> str:
    """The end of a line that tells the user how to go on; "" where a script around the run does."""
    return "" if WHO_GOES_ON in os.environ else f": {how} to go on"


def stop() -> None:
    """Raise `Preempted` if this rank was asked to end. Other ranks are not consulted."""
    if _received:
        raise Preempted
