"""Storages that fsspec reads over a network: asked again after what may be a failure of it.

PyTorch is not imported here.
"""

import errno
import time
from collections.abc import Callable
from typing import Any, TypeVar

from ds_cmli.errors import blame

FIRST_PAUSE = 1.0  # seconds before the second try, doubled before each further one
MAX_PAUSE = 16.0
DISK_IS_FULL = (errno.ENOSPC, errno.EDQUOT)

T = TypeVar("T")


def storage_options(url: str) -> dict[str, Any]:
    """Return the options of fsspec for a URL: no limit on a whole transfer, but on its silence."""
    if not url.startswith(("http://", "https://")):
        return {}
    import aiohttp

    limits = aiohttp.ClientTimeout(total=None, sock_connect=20, sock_read=20)
    return {"client_kwargs": {"timeout": limits}}


def ask_again(ask: Callable[[], T], failure: str, seconds: float) -> T:
    """Return what `ask` returns; what may be a failure of the network is tried again for a while.

    Args:
        failure: the beginning of the message if the storage refuses or does not answer.
        seconds: in which tries begin.

    Raises `FileNotFoundError`, at once, if the file does not exist, `OSError` if the disk of this
    node is full, and `UserError` if the storage refuses or does not answer.
    """
    deadline = time.monotonic() + seconds
    pause = FIRST_PAUSE
    num_tries = 0
    while True:
        num_tries += 1
        try:
            return ask()
        except Exception as error:  # each storage has errors of its own
            if isinstance(error, OSError) and error.errno in DISK_IS_FULL:
                raise
            answer: BaseException = error
            if isinstance(error, FileNotFoundError) and error.__cause__ is not None:
                answer = error.__cause__  # by HTTP a size is also not found if the server fails
            status = getattr(answer, "status", None)
            if status == 404 or isinstance(answer, FileNotFoundError):
                raise FileNotFoundError("no such file") from None
            is_refused = status in (401, 403) or isinstance(answer, PermissionError)
            if is_refused or time.monotonic() + pause > deadline:
                with blame(f"{failure} ({num_tries} tries)"):
                    raise answer from None
        time.sleep(pause)
        pause = min(2 * pause, MAX_PAUSE)
