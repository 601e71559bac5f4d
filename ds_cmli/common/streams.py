"""Standard streams that may be closed, full, or without a reader: what is printed is lost then, and nothing else.

A training must not end because a terminal or a log has gone away.
"""

import errno
import io
import os
import sys
from contextlib import suppress

READER_GONE = (errno.EPIPE, errno.EIO, errno.ECONNRESET)


class _Lasting(io.FileIO):
    """A stream's file, whose errors are kept and not raised. Attribute: `lost`, the first of them."""

    lost: OSError | None = None

    def write(self, data) -> int:
        try:
            return super().write(data) or 0
        except OSError as error:
            self.lost = self.lost or error
            return memoryview(data).nbytes


_guarded: dict[str, _Lasting] = {}


def guard() -> None:
    """Replace stdout and stderr by streams that do not fail. To be called before files are opened; once is enough."""
    if _guarded:
        return
    for number in range(
        3
    ):  # otherwise the next file that is opened becomes the stream, for libraries in C as well
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    for name, number in (("stdout", 1), ("stderr", 2)):
        before = getattr(sys, name)
        with suppress(AttributeError, OSError, ValueError):
            before.flush()
        file = _guarded[name] = _Lasting(number, "w", closefd=False)
        encoding = getattr(before, "encoding", None) or "utf-8"
        stream = io.TextIOWrapper(
            io.BufferedWriter(file), encoding, "backslashreplace", line_buffering=True
        )
        setattr(sys, name, stream)


def lost_output() -> str | None:
    """What is to be told of an output that could not be written to stdout; None if nobody wanted to read it."""
    file = _guarded.get("stdout")
    if file is None or file.lost is None or file.lost.errno in READER_GONE:
        return None
    return f"stdout cannot be written: {file.lost.strerror}"
