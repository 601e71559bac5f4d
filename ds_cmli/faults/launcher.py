"""Detects the end of this rank's launcher, without which nobody ends the ranks together.

`torchrun` is the parent process of its ranks. `deepspeed` is their grandparent: a
`deepspeed.launcher.launch` process stands between them, and survives it. A rank that `srun` or
plain `python` started has no such launcher.
"""

import os
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

# Only the command `deepspeed` starts this module.
STARTED_BY_DEEPSPEED = "deepspeed.launcher.launch"
PROGRAMS = (
    "torchrun",
    "torch.distributed.run",
    "torch.distributed.launch",
    "accelerate",
    "deepspeed",
    "ds",
    "deepspeed.launcher.runner",
    STARTED_BY_DEEPSPEED,
)
# Like process 1, these become the parent of a process whose parent has ended.
REAPERS = ("systemd", "slurmstepd")
INTERVAL = 0.5  # seconds


def watch(gone: Callable[[], None]) -> None:
    """Call `gone` once, from a thread, when the launcher has ended; never if there is none."""
    if "TORCHELASTIC_RUN_ID" in os.environ or {"CROSS_RANK", "LOCAL_SIZE"} <= os.environ.keys():
        threading.Thread(target=_watch, args=(gone,), daemon=True).start()


def _watch(gone: Callable[[], None]) -> None:
    found = _ancestors()
    while not found.orphan and all(_parent(child) == parent for child, parent in found.links):
        time.sleep(INTERVAL)
    gone()


class Ancestors(NamedTuple):
    links: list[tuple[int, int]]  # (process, parent) from this rank up to its launcher
    orphan: bool  # whether the launcher has already ended
    ending: bool  # whether one of these processes seems to be ending at this moment


def _ancestors() -> Ancestors:
    """Look for the launcher, again while one of the processes is ending.

    A process that is ending is still a parent, but its command line can no longer be read.
    """
    found = _walk()
    for _ in range(100):
        if not found.ending:
            break
        time.sleep(0.02)
        found = _walk()
    return found


def _walk() -> Ancestors:
    links: list[tuple[int, int]] = []
    known = 0  # number of links up to the highest launcher that was recognised
    program, pid, ending = "", os.getpid(), False
    while pid > 1 and len(links) < 16 and not _reaped(pid):
        links.append((pid, _parent(pid)))
        pid = links[-1][1]
        name = _program(pid)
        ending = ending or name is None
        if name in PROGRAMS:
            known, program = len(links), name
    if not known:  # the launcher has ended, or its name is not in PROGRAMS
        return Ancestors(links[:1], _orphaned(pid), ending)
    top = links[known - 1][1]
    orphan = program == STARTED_BY_DEEPSPEED and _orphaned(top)
    return Ancestors(links[:known], orphan, ending)


def _orphaned(pid: int) -> bool:
    """Whether the parent of `pid` has ended.

    Then `pid` is in a process group that neither it nor its new parent leads.
    """
    if not _reaped(pid) or str(pid) == os.environ.get("SLURM_TASK_PID"):
        return False
    try:
        return os.getpgid(pid) not in (pid, os.getpgid(_parent(pid)))
    except OSError:
        return True


def _reaped(pid: int) -> bool:
    parent = _parent(pid)
    return parent <= 1 or _stat(parent)[0] in REAPERS


def _parent(pid: int) -> int:
    """The parent of a process; 0 if the process has ended."""
    return _stat(pid)[1]


def _stat(pid: int) -> tuple[str, int]:
    """Name and parent of a process; an empty name and 0 if it has ended."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            text = file.read()
    except OSError:
        return "", 0
    end = text.rindex(")")  # the name may hold brackets and spaces
    state, parent = text[end + 2 :].split()[:2]
    return text[text.index("(") + 1 : end], 0 if state in "ZX" else int(parent)


def _program(pid: int) -> str | None:
    """The module or script that a Python process runs; None if it is ending or has ended."""
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            words = file.read().decode(errors="replace").split("\0")[:8]
    except (FileNotFoundError, ProcessLookupError):
        return None
    except OSError:
        return ""
    if words == [""]:
        return None
    while len(words) > 1 and _is_interpreter_or_option(words[0]):
        if words[0] == "-m":
            return words[1]
        words = words[1:]
    path = words[0].removesuffix(".py").split("/")
    for name in PROGRAMS:
        if path[-1:] == [name] or path[-3:] == name.split("."):
            return name
    return ""


def _is_interpreter_or_option(word: str) -> bool:
    return os.path.basename(word).startswith("python") or word.startswith("-")
