"""The line of the user's code that runs now."""

import os
import sys
import sysconfig
import threading
from functools import cache
from types import FrameType

# Folders of libraries: what lies elsewhere is the user's own.
LIBRARIES = tuple(
    os.path.realpath(sysconfig.get_path(name)) + os.sep
    for name in ("stdlib", "platstdlib", "purelib", "platlib")
)
OURS = os.path.dirname(os.path.dirname(os.path.realpath(__file__))) + os.sep
MAIN = threading.main_thread().ident


@cache
def is_users(filename: str) -> bool:
    if filename.startswith("<"):
        return False
    path = os.path.realpath(filename)
    return not path.startswith((OURS, *LIBRARIES))


def current() -> str:
    """The innermost line of the user's code as "FILE:LINE"; "" if there is none.

    In autograd's thread, which has no Python frames of the user, it is that of the main thread.
    """
    found = _innermost(sys._getframe(1))
    if not found and threading.get_ident() != MAIN:
        found = _innermost(sys._current_frames().get(MAIN or 0))
    return found


def _innermost(frame: FrameType | None) -> str:
    while frame is not None:
        if is_users(frame.f_code.co_filename):
            return f"{os.path.relpath(frame.f_code.co_filename)}:{frame.f_lineno}"
        frame = frame.f_back
    return ""
