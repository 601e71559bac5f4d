"""What the commands share: options in groups, and how they end. A user's mistake is one line and exit code 2."""

import atexit
import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import click

from ds_cmli.common.errors import UserError


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


@contextlib.contextmanager
def json_on_stdout(alone: bool = True) -> Iterator[Callable[[Any], None]]:
    """Inside, whatever is printed goes to stderr, but for what the function that it gives prints to stdout as JSON.

    alone=False: only that function is given.
    """
    stdout = sys.stdout
    with contextlib.redirect_stdout(sys.stderr) if alone else contextlib.nullcontext():
        yield lambda value: print(json.dumps(value), file=stdout, flush=True)


def _is_main() -> bool:
    """Whether this is the rank that speaks for all, also before the ranks have met."""
    return int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))) == 0


def check_writable(name: str) -> None:
    """Now, and not after minutes of work. Raises `UserError`."""
    try:
        with open(name, "a"):
            pass
    except OSError as error:
        raise UserError(f"cannot write {name!r}: {error.strerror}") from None


def run_command(command: click.Command) -> NoReturn:
    """Run a click command and end the process with its exit code."""
    leave(exit_code(command))


def exit_code(command: click.Command) -> int:
    try:
        return command.main(standalone_mode=False) or 0
    except UserError as error:
        return _report(str(error))
    except click.ClickException as error:
        return _report(error.format_message())
    except OSError as error:  # of a file that the user named, or the disk: no bug of this code's
        if error.filename is None:
            raise
        return _report(f"{error.strerror}: {error.filename!r}")
    except (click.exceptions.Abort, KeyboardInterrupt):
        return _report("interrupted")


def leave(code: int) -> NoReturn:
    """End the process with this code, whatever threads the libraries still have.

    In the interpreter's own end such a thread can abort the process ("terminate called without an active exception"),
    and a scheduler would take a run that is finished, or saved and to be continued, for one that failed.
    """
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # nobody reads it any more
            stream.flush()
    os._exit(code)


def _report(message: str) -> int:
    # Ranks started together meet the same mistake: rank 0 tells it for all.
    if _is_main():
        print("error: " + " ".join(message.split()), file=sys.stderr, flush=True)
    return 2
