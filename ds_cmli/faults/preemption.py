"""A signal only sets a flag: the step is finished, all ranks save, and the exit code is 85.

Before the first step there is nothing to save: a start that a signal has not ended by then is
ended `START_SECONDS` later by a thread, whatever the main thread waits for.

TERM, USR1, USR2, INT, QUIT and HUP all have this effect, since schedulers differ in what they send,
and so has the end of the launcher. A second INT ends the process at once. This module imports
nothing heavy: a signal that arrives before `install` kills the process, so `install` is called
before everything else.

`torchrun` is the parent process of its ranks. `deepspeed` is their grandparent: a
`deepspeed.launcher.launch` process stands between them, and survives it. A rank that `srun` or
plain `python` started has no such launcher. Without a launcher nobody ends the ranks together.
"""

import atexit
import multiprocessing.util
import os
import re
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType

from ds_cmli.common.cli import say

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
START_SECONDS = 3.0  # in which a start that was signalled may end by itself
# A variable that torchrun, and one that `deepspeed`, sets for its ranks.
OF_TORCHRUN, OF_DEEPSPEED = "TORCHELASTIC_RUN_ID", "CROSS_RANK"
# Like process 1, these become the parent of a process whose parent has ended.
REAPERS = ("systemd", "slurmstepd")
INTERVAL = 0.5  # seconds between two looks for the launcher

_received: list[str] = []
_training = threading.Event()
before_leaving: list[Callable[[], None]] = []  # called where a start is ended


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
    threading.Thread(target=_read_signals, args=(reader,), daemon=True).start()
    watch_launcher(lambda: ask("the end of its launcher"))
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


def ask(reason: str, seconds: float = START_SECONDS) -> None:
    """Ask the run to end, from any thread, as a signal does; a start has `seconds` for it."""
    _received.append(reason)
    timer = threading.Timer(seconds, end_start)
    timer.daemon = True
    timer.start()


def begin() -> None:
    """Leave the end to the training loop from now on: it saves what it has."""
    _training.set()


def end_start() -> None:
    """End the process where it was signalled to end before training; otherwise return."""
    if _training.is_set() or not _received:
        return

    def leave() -> None:
        for process in multiprocessing.active_children():
            process.kill()
        for call in before_leaving:
            call()
        say(f"stopped before step 1 by {requested()}{to_go_on('start again')}")

    # A file system or a terminal that does not answer must not delay the end; ranks wait for each
    # other's.
    thread = threading.Thread(target=leave, daemon=True)
    thread.start()
    thread.join(1.0 if os.environ.get("WORLD_SIZE", "1") == "1" else 12.0)
    os._exit(EXIT_CODE)


def _read_signals(reader: int) -> None:
    first: float | None = None
    while True:
        for number in os.read(reader, 64):
            if not _training.is_set() and number in SIGNALS:
                ask(signal.Signals(number).name)
            if number == signal.SIGINT:
                now = time.monotonic()
                first = first or now
                if now - first > SAME_PRESS:
                    os._exit(128 + signal.SIGINT)


def requested() -> str | None:
    """The name of the first signal (or event) that asked the run to end; None if there was none."""
    return next(iter(_received), None)


def to_go_on(how: str) -> str:
    """The end of a line that tells the user how to go on; "" where a script around the run does."""
    return "" if WHO_GOES_ON in os.environ else f": {how} to go on"


def watch_launcher(gone: Callable[[], None]) -> None:
    """Call `gone` once, from a thread, when the launcher has ended; never if there is none."""
    if OF_TORCHRUN in os.environ or {OF_DEEPSPEED, "LOCAL_SIZE"} <= os.environ.keys():
        threading.Thread(target=_watch, args=(gone,), daemon=True).start()


def _watch(gone: Callable[[], None]) -> None:
    links = _links()
    while links is not None and all(_parent(child) == parent for child, parent in links):
        time.sleep(INTERVAL)
    gone()


def _links() -> list[tuple[int, int]] | None:
    """(process, parent) from this rank up to its launcher; None if the launcher has ended.

    The launcher is known by what it lacks: a script between it and a rank was started with the
    rank's variables, and the launcher without them. Whoever started it may end before it does.
    """
    links: list[tuple[int, int]] = []
    child, started_by_another = os.getpid(), OF_DEEPSPEED in os.environ
    while not _reaps(parent := _parent(child)):
        links.append((child, parent))
        child = parent
        if not _is_of_a_rank(child):
            if not started_by_another:
                return links
            started_by_another = False
    return None if _orphaned(child) else links


def _is_of_a_rank(pid: int) -> bool:
    """Whether a process was started with the variables of a rank."""
    try:
        environment = Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:  # it has ended, or belongs to another user
        return False
    return re.search(f"(^|\0)({OF_TORCHRUN}|{OF_DEEPSPEED})=".encode(), environment) is not None


def _orphaned(pid: int) -> bool:
    """Whether the parent of `pid` has ended.

    Then `pid` is in a process group that neither it nor its new parent leads.
    """
    if not _reaps(_parent(pid)) or str(pid) == os.environ.get("SLURM_TASK_PID"):
        return False
    try:
        return os.getpgid(pid) not in (pid, os.getpgid(_parent(pid)))
    except OSError:
        return True


def _reaps(pid: int) -> bool:
    """Whether a process is a parent of those whose own has ended."""
    process = status(pid)
    return pid <= 1 or (process is not None and process[0] in REAPERS)


def _parent(pid: int) -> int:
    """The parent of a process; 0 if the process has ended."""
    process = status(pid)
    return 0 if process is None else int(process[1][1])


def status(pid: int) -> tuple[str, list[str]] | None:
    """The name of a process and its other fields in /proc, from its state on; None if it ended."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return None
    name, _, rest = text.partition("(")[2].rpartition(") ")  # it may hold brackets and spaces
    fields = rest.split()
    return None if fields[0] in "ZX" else (name, fields)
