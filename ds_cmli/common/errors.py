"""The one exception that a user is meant to read: one line without traceback, exit code 2."""

import os
import resource
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path


class UserError(Exception):
    """A mistake that the user can correct.

    The message is one line with the setting, the value found and what to do.
    """


@contextmanager
def blame(what: str) -> Iterator[None]:
    """Turn a library's exception into a `UserError` of one line that begins with `what`.

    With DS_CMLI_TRACEBACK=1 the exception stays as it is.
    """
    try:
        yield
    except (UserError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # a panic of Rust, as tokenizers has, is no `Exception`
        if os.environ.get("DS_CMLI_TRACEBACK") == "1":
            raise
        raise UserError(f"{what}: {type(error).__name__}: {one_line(error)[:500]}") from None


def one_line(error: BaseException) -> str:
    """An error's message, or its type's name where it has none, as one line."""
    return " ".join(str(error).split()) or type(error).__name__


def printable(text: str) -> str:
    r"""The text with what is no Unicode, as in names of files and in JSON, written as \udcff."""
    return text.encode(errors="backslashreplace").decode()


def first_line(error: Exception) -> str:
    """The first line of an error's message, or its type's name where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def nearest(name: str, known: Iterable[object]) -> str:
    """Hint at what an unknown name may mean: `did you mean 'x'?`, or else all known names."""
    import difflib

    names = sorted(map(str, known))
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    if close:
        return f"did you mean '{close[0]}'?"
    return f"known: {', '.join(names)}"


def too_many_files(where: str = "") -> str:
    """The line for a process that may open no more files, without what else to do."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return f"too many open files{where}, ulimit -n is {limit}: raise it (ulimit -n 4096)"


def check_regular(setting: str, *paths: Path) -> None:
    """Raise `UserError` for a FIFO, a socket or a device, and for one in a folder that is given.

    To open it could wait for ever, and to read it need not end. What is not there is no error.
    """
    for path in paths:
        for file in [path, *sorted(path.glob("*"))]:
            if file.exists() and not (file.is_file() or file.is_dir()):
                raise UserError(f"{setting}: {os.fspath(file)!r} is no regular file")
