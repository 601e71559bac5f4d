"""What all commands share: grouped options, and one line and exit code 2 for a user's mistake."""

import atexit
import contextlib
import os
import sys
from collections.abc import Callable
from typing import Any, NoReturn

import click

from ds_cmli.common.errors import UserError
from ds_cmli.common.provenance import version

DOES_NOT_FIT = 3  # exit code of a command about what fits


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
    """Print on rank 0."""
    for line in lines:
        if line and prints():
            print(line, flush=True)


def prints() -> bool:
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


def run_command(command: click.Command) -> NoReturn:
    """Run a click command, which gets the option --version, and end the process."""
    for stream in filter(None, (sys.stdout, sys.stderr)):
        # What cannot be written is an error at once, and not at the end, which hides it.
        stream.reconfigure(errors="backslashreplace", line_buffering=True)  # type: ignore[union-attr]
    leave(exit_code(click.version_option(version(), prog_name="ds-cmli")(command)))


def exit_code(command: click.Command) -> int:
    """Run a command; a mistake is one line, which rank 0 prints, as all ranks meet the same one."""
    try:
        return command.main(standalone_mode=False) or 0
    except UserError as error:
        message = str(error)
    except click.ClickException as error:
        message = error.format_message()
    except OSError as error:
        if error.filename is None:  # it is not the file that the user named
            raise
        message = f"{error.strerror}: {error.filename!r}"
    except (click.Abort, KeyboardInterrupt):
        message = "interrupted"
    if prints():
        print("error: " + " ".join(message.split()), file=sys.stderr, flush=True)
    return 2


def leave(code: int) -> NoReturn:
    """End the process with this exit code, even if threads of libraries are still running.

    During the interpreter's normal shutdown such a thread can abort the process ("terminate called
    without an active exception"). A scheduler would then count a run that has finished, or that has
    saved and is to go on, as failed.
    """
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):  # it is closed
            stream.flush()
    os._exit(code)
