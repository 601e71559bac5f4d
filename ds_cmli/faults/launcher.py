"""Detects the end of this rank's launcher. Without a launcher nobody forwards signals or ends the ranks together.

`torchrun` is the parent process of its ranks. `deepspeed` is their grandparent: a `deepspeed.launcher.launch` process
stands between them, and survives it. A rank that `srun` or plain `python` started has no such launcher.
"""

import os
import threading
import time
from collections.abc import Callable

PROGRAMS = ("torchrun", "torch.distributed.run", "torch.distributed.launch", "accelerate", "deepspeed", "ds",
            "deepspeed.launcher.runner", "deepspeed.launcher.launch")  # fmt: skip
STARTED_BY_DEEPSPEED = (
    "deepspeed.launcher.launch"  # only the command `deepspeed` starts this module
)
REAPERS = (
    "systemd",
    "slurmstepd",
)  # like process 1, they become the parent of a process whose parent has ended
INTERVAL = 0.5  # seconds


def watch(gone: Callable[[], None]) -> None:
    """Call `gone` once, from a thread, when the launcher has ended. Without a launcher it is never called."""
    if "TORCHELASTIC_RUN_ID" in os.environ or {"CROSS_RANK", "LOCAL_SIZE"} <= os.environ.keys():
        threading.Thread(target=_watch, args=(gone,), daemon=True).start()


def _watch(gone: Callable[[], None]) -> None:
    links, orphan = _links()
    while not orphan and all(_parent(child) == parent for child, parent in links):
        time.sleep(INTERVAL)
    gone()


def _links() -> tuple[list[tuple[int, int]], bool]:
    """The pairs (process, parent) from this rank up to its launcher, and whether the launcher has already ended."""
    links, orphan, ending = _walk()
    for _ in range(100):
        if (
            not ending
        ):  # a process that is ending is still a parent, but its command line can no longer be read
            break
        time.sleep(0.02)
        links, orphan, ending = _walk()
    return links, orphan


def _walk() -> tuple[list[tuple[int, int]], bool, bool]:
    """What `_links` returns, and whether one of these processes seems to be ending at this moment."""
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
        return links[:1], _orphaned(pid), ending
    top = links[known - 1][1]
    return links[:known], program == STARTED_BY_DEEPSPEED and _orphaned(top), ending


def _orphaned(pid: int) -> bool:
    """Whether the parent of `pid` has ended: `pid` is in a process group that neither it nor its new parent leads."""
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
    """The name of the module or script that a Python process runs; None if it is ending or has ended."""
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            words = file.read().decode(errors="replace").split("\0")[:8]
    except (FileNotFoundError, ProcessLookupError):
        return None
    except OSError:
        return ""
    if words == [""]:
        return None
    while len(words) > 1 and (
        os.path.basename(words[0]).startswith("python") or words[0].startswith("-")
    ):
        if words[0] == "-m":
            return words[1]
        words = words[1:]
    path = words[0].removesuffix(".py").split("/")
    return next(
        (name for name in PROGRAMS if path[-1:] == [name] or path[-3:] == name.split(".")), ""
    )
