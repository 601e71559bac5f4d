"""Another attempt after errors of servers that may pass, and why the last one failed.

Each library raises errors of its own, which differ by the status of HTTP in them.
"""

import errno
import re
import time
from collections.abc import Callable
from typing import TypeVar

from ds_cmli.common.errors import UserError, one_line

WAITS = (1.0, 2.0, 4.0, 8.0)  # seconds before another attempt
REFUSED = (401, 403, 404, 410)  # statuses of HTTP
NOT_NOW = (408, 425, 429)  # these, and 500 to 599, may pass
LASTING = (UserError, FileNotFoundError, PermissionError)
OF_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)
Pause = Callable[[float], object]  # waits so many seconds
Value = TypeVar("Value")


def patiently(
    action: Callable[[], Value],
    of_network: bool = True,
    left: Callable[[], int] = int,
    pause: Pause = time.sleep,
) -> Value:
    """The result of `action`, which is called again after errors of a server that may pass.

    Args:
        of_network: whether it is called again without an answer of the server too.
        left: the bytes still missing; attempts are counted from the last that brought some.
    """
    waits, before = list(WAITS), left()
    while True:
        try:
            return action()
        except Exception as error:  # each library has its own
            status = status_of(error)
            passes = of_network if status is None else status in NOT_NOW or status >= 500
            if not passes or isinstance(error, LASTING) or of_disk(error):
                raise
            now = left()
            if now < before:
                waits, before = list(WAITS), now
            if not waits:
                raise
        pause(waits.pop(0))


def refuses(error: Exception) -> bool:
    """Whether a server has answered that it will not send what was requested."""
    return status_of(error) in REFUSED or isinstance(error, LASTING)


def of_disk(error: Exception) -> bool:
    """Whether an error is one of this machine's disk."""
    return isinstance(error, OSError) and error.errno in OF_DISK


def status_of(error: BaseException | None) -> int | None:
    """The status of HTTP that an error, or its cause, is about; None if no server answered."""
    while error is not None:
        response = getattr(error, "response", None)
        status = getattr(response, "status_code", None)
        if isinstance(status, int):
            return status
        error = error.__cause__
    return None


def why_of(error: BaseException) -> str:
    """The reason in a few words, without queries of URLs, which may hold a key."""
    status = status_of(error)
    if status is not None:
        return f"HTTP {status}"
    if type(error).__name__ == "OfflineModeIsEnabled":
        return "HF_HUB_OFFLINE is set, or it does not answer"
    if type(error).__name__ == "LocalEntryNotFoundError" and error.__cause__ is not None:
        error = error.__cause__  # the hub's library has a long text of its own for every cause
    line = re.sub(r"\?[^\s'\"]*", "?...", one_line(error))
    return f"{type(error).__name__}: {line}"[:200]
