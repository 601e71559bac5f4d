"""Runs a script or a module in this process as `python` would, until its steps are done."""

import os
import runpy
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_APPEND
_opened: set[str] = set()  # files that the program has opened to write
_running = False


class NotFollowed(BaseException):
    """Ends a program whose memory would be wrong; no `Exception`, which programs catch."""


class StepsDone(BaseException):
    """Ends the program. Like SystemExit it is no `Exception`, which programs catch."""


def run(
    command: Sequence[str],
    is_done: Callable[[BaseException], bool],
    passed: tuple[type[BaseException], ...] = (),
) -> int:
    """Run `python COMMAND` and return its exit code, 0 where its steps are done.

    Args:
        command: a script and its arguments, or "-m", a module and its arguments.
        is_done: whether they were done before an error, or an exit.
        passed: errors that are the caller's; all others are reported as Python does.
    """
    with _started_as_by_python(command):
        try:
            if command[0] == "-m":
                runpy.run_module(command[1], run_name="__main__", alter_sys=True)
            else:
                runpy.run_path(command[0], run_name="__main__")
        except StepsDone:
            pass
        except SystemExit as end:
            return 0 if is_done(end) else _exit_code(end)
        except KeyboardInterrupt:
            raise
        except passed:
            raise
        except BaseException as error:
            if is_done(error):
                return 0
            own = of_program(error)
            sys.excepthook(type(error), error.with_traceback(own), own)
            return 1
    return 0


def of_program(error: BaseException) -> TracebackType | None:
    """The traceback of an error from the program's first line on."""
    own = error.__traceback__
    while own is not None and not _is_programs(own):
        own = own.tb_next
    return own


def _is_programs(frames: TracebackType) -> bool:
    file = frames.tb_frame.f_code.co_filename
    ours = os.path.dirname(__file__) + os.sep
    return not (file == runpy.__file__ or file.startswith((ours, "<frozen")))


def _exit_code(end: SystemExit) -> int:
    if end.code is None or isinstance(end.code, int):
        return end.code or 0
    print(end.code, file=sys.stderr)
    return 1


@contextmanager
def _started_as_by_python(command: Sequence[str]) -> Iterator[None]:
    global _running
    arguments, path = sys.argv, list(sys.path)
    sys.addaudithook(_note_opened)
    if command[0] == "-m":
        sys.argv, sys.path[0] = list(command[1:]), os.getcwd()
    else:
        sys.argv, sys.path[0] = list(command), str(Path(command[0]).resolve().parent)
    try:
        _running = True
        yield
    finally:
        _running = False
        sys.argv, sys.path[:] = arguments, path


def _note_opened(event: str, arguments: tuple) -> None:
    if not _running or event != "open" or not isinstance(arguments[0], str | bytes):
        return
    if (arguments[2] or 0) & WRITING:
        _opened.add(os.path.abspath(os.fsdecode(arguments[0])))


def written() -> str:
    """A line about the files that the program has written and not removed; "" without any."""
    left = [os.path.relpath(file) for file in sorted(_opened) if os.path.isfile(file)]
    left = [file for file in left if "__pycache__" not in file]
    if not left:
        return ""
    more = len(left) - 5
    if more > 0:
        left[5:] = [f"{more} more"]
    return f"files that the program wrote: {', '.join(left)}"
