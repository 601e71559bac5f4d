"""What all commands share: grouped options, and one line and exit code 2 for a user's mistake."""

import atexit
import contextlib
import errno
import io
import os
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from ds_cmli.common import provenance
from ds_cmli.common.errors import UserError, too_many_files

if TYPE_CHECKING:
    from typing_extensions import Buffer


DOES_NOT_FIT = 3  # exit code of a command about what fits
READER_GONE = (errno.EPIPE, errno.EIO, errno.ECONNRESET)


class GroupedOption(click.Option):
    def __init__(self, *args: Any, group: str, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.group = group


class GroupedCommand(click.Command):
    """A command whose `--help` lists its options under the groups they were declared with."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        groups: dict[str, list] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                groups.setdefault(getattr(parameter, "group", "Other"), []).append(record)
        for name, records in groups.items():
            with formatter.section(name):
                formatter.write_dl(records)


def option(group: str, *names: str, **kwargs: Any) -> Callable:
    return click.option(*names, cls=GroupedOption, group=group, **kwargs)


def say(*lines: str | None) -> None:
    for line in lines:
        if line and _is_main():
            print(line, flush=True)


def _is_main() -> bool:
    """Whether this process prints for all ranks. Works before the process group exists.

    It is rank 0, or one that is no rank of a run, for which no other speaks.
    """
    rank = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))
    ranks = os.environ.get("WORLD_SIZE", "0" if "RANK" in os.environ else "")
    alone = not rank.isdecimal() or (ranks.isdecimal() and int(rank) >= int(ranks))
    return alone or int(rank) == 0


def check_writable(name: str) -> None:
    """Raise `UserError` if a file cannot be written, before the work whose result it will hold.

    Nothing is left of a file that was not there.
    """
    there = os.path.lexists(name)
    try:
        with open(name, "a"):
            pass
        if not there:
            os.remove(name)
    except OSError as error:
        raise UserError(f"cannot write {name!r}: {error.strerror}") from None


def run_command(command: click.Command, prints_results: bool = True) -> NoReturn:
    """Run a click command, which gets the option --version, and end the process with its exit code.

    Args:
        prints_results: what it prints is what it was started for, so that an output that is lost is
            an error.
    """
    guard_streams()
    version = click.version_option(provenance.version(), prog_name="ds-cmli")
    code = exit_code(version(command))
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
    lost = lost_output()
    if lost is not None:
        print(f"{'error' if prints_results else 'warning'}: {lost}", file=sys.stderr)
        code = code or int(prints_results)
    leave(code)


def exit_code(command: click.Command) -> int:
    try:
        refuse_another_checkout()
        refuse_twice(command, sys.argv[1:])
        return command.main(standalone_mode=False) or 0
    except UserError as error:
        return _report(str(error))
    except click.ClickException as error:
        return _report(error.format_message())
    except OSError as error:  # the file that the user named, or the system's limits, are at fault
        if error.errno == errno.EMFILE:
            return _report(too_many_files())
        if error.filename is None:
            raise
        return _report(f"{error.strerror}: {error.filename!r}")
    except (click.exceptions.Abort, KeyboardInterrupt):
        return _report("interrupted")


def refuse_another_checkout() -> None:
    """Raise `UserError` if the script that was started lies in another checkout than this package.

    Python then has the package of one installed, and was given the path of a script of the other.
    """
    script = Path(getattr(sys.modules["__main__"], "__file__", None) or __file__).resolve()
    package = Path(__file__).resolve().parents[1]
    for folder in script.parents[:2]:
        if folder != package and (folder / "common" / "cli.py").is_file():
            raise UserError(
                f"{script} would run the package of another checkout, {package.parent}: set "
                f"PYTHONPATH={folder.parent}, or pip install -e {folder.parent}"
            )


def refuse_twice(command: click.Command, arguments: list[str]) -> None:
    """Raise `UserError` for an option given twice, of which click takes the last one silently.

    A flag may be repeated, and an option that is made for several values.
    """
    with click.Context(command, ignore_unknown_options=True, resilient_parsing=True) as context:
        try:
            _, _, order = command.make_parser(context).parse_args(list(arguments))
        except click.UsageError:
            return  # click reports it
    for option, times in Counter(order).items():
        if times == 1 or not isinstance(option, click.Option) or option.multiple or option.count:
            continue
        if not option.is_flag:
            raise UserError(f"{option.opts[0]} is given {times} times: keep one")
        if {*option.opts} & {*arguments} and {*option.secondary_opts} & {*arguments}:
            other = option.secondary_opts[0]
            raise UserError(f"{option.opts[0]} and {other} contradict each other: keep one")


def leave(code: int) -> NoReturn:
    """End the process with this exit code, even if threads of libraries are still running.

    During the interpreter's normal shutdown such a thread can abort the process ("terminate called
    without an active exception"). A scheduler would then count a run that has finished, or that has
    saved and is to go on, as failed.
    """
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # the reader of the pipe is gone
            stream.flush()
    os._exit(code)


def _report(message: str) -> int:
    # All ranks of a run meet the same mistake, so only rank 0 prints it.
    if _is_main():
        print("error: " + " ".join(message.split()), file=sys.stderr, flush=True)
    return 2


class _Lasting(io.FileIO):
    """A stream's file, whose errors are kept and not raised."""

    lost: OSError | None = None  # the first error

    def write(self, data: "Buffer", /) -> int:
        try:
            return super().write(data) or 0
        except OSError as error:
            self.lost = self.lost or error
            return memoryview(data).nbytes


_guarded: dict[str, _Lasting] = {}


def guard_streams() -> None:
    """Replace stdout and stderr by streams that do not fail; called before files are opened."""
    if _guarded:
        return
    # Otherwise the next file that is opened becomes the stream, for libraries in C as well.
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    for name, number in (("stdout", 1), ("stderr", 2)):
        before = getattr(sys, name)
        with contextlib.suppress(AttributeError, OSError, ValueError):
            before.flush()
        file = _guarded[name] = _Lasting(number, "w", closefd=False)
        encoding = getattr(before, "encoding", None) or "utf-8"
        stream = io.TextIOWrapper(
            io.BufferedWriter(file), encoding, "backslashreplace", line_buffering=True
        )
        setattr(sys, name, stream)


def lost_output() -> str | None:
    """Say that stdout could not be written; None if nobody wanted to read it."""
    file = _guarded.get("stdout")
    if file is None or file.lost is None or file.lost.errno in READER_GONE:
        return None
    return f"stdout cannot be written: {file.lost.strerror}"
