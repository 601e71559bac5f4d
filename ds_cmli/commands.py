"""Lines that commands print, the report of a mistake, and the end of the process."""

import atexit
import os
import sys
from contextlib import suppress
from typing import NoReturn

import click

from ds_cmli.distributed import this_node
from ds_cmli.distributed.mistakes import lowest_rank
from ds_cmli.provenance import version

MAX_LINE = 1500  # characters of a mistake's line


def print_line(*lines: str | None) -> None:
    """Print on rank 0 alone; None and "" are left out."""
    for line in lines:
        if line and prints():
            print(line, flush=True)


def noun(number: int, singular: str) -> str:
    """Return the noun that follows a number: "pair" or "pairs", "class" or "classes"."""
    plural = f"{singular}es" if singular.endswith("s") else f"{singular}s"
    return singular if number == 1 else plural


def prints() -> bool:
    """Return True if this process prints for all ranks: rank 0, or a process outside of any run."""
    rank = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))
    ranks = os.environ.get("WORLD_SIZE", "0" if "RANK" in os.environ else "")
    alone = not rank.isdecimal() or (ranks.isdecimal() and int(rank) >= int(ranks))
    return alone or int(rank) == 0


def run_command(command: click.Command) -> NoReturn:
    """Run a click command, which gets the option --version, and end the process."""
    for stream in filter(None, (sys.stdout, sys.stderr)):
        # Line buffering raises a failed write at once; at exit it would be hidden.
        stream.reconfigure(errors="backslashreplace", line_buffering=True)  # type: ignore[union-attr]
    leave(exit_code(click.version_option(version(), prog_name="ds-cmli")(command)))


def exit_code(command: click.Command) -> int:
    """Run a command; a mistake is one line, which the lowest rank that has met it prints."""
    try:
        return command.main(standalone_mode=False) or 0
    except click.ClickException as error:
        message = error.format_message()
    except OSError as error:
        if error.filename is None:  # it is not the file that the user named
            raise
        message = f"{error.strerror}: {error.filename!r}"
    except click.Abort:
        message = "interrupted"
    line = " ".join(message.split())
    if len(line) > MAX_LINE:  # it repeats a long value
        line = f"{line[: MAX_LINE // 2]} ... {line[-MAX_LINE // 2 :]}"
    if prints():  # rank 0 need not ask the others
        print(f"error: {line}", file=sys.stderr, flush=True)
    lowest = lowest_rank()  # called on rank 0 too, because it opens the store for the others
    if not prints() and lowest > 0 and os.environ["RANK"] == str(lowest):
        print(f"error: rank {lowest} on node {this_node()}: {line}", file=sys.stderr, flush=True)
    return 2


def leave(code: int) -> NoReturn:
    """End the process with this exit code, even if threads of libraries are still running.

    During the interpreter's normal shutdown such a thread can abort the process, and a scheduler
    would count a run that has finished, or that has saved and is to go on, as failed.
    """
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, AttributeError):  # it is closed
            stream.flush()
    os._exit(code)
