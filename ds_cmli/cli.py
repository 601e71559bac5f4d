"""What the commands share: options in groups, and how they end. A user's mistake is one line and exit code 2."""

import os
import sys
from collections.abc import Callable
from typing import Any

import click

from ds_cmli.errors import UserError


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


def run_command(command: click.Command) -> None:
    """Run a click command and exit."""
    try:
        code = command.main(standalone_mode=False) or 0
    except UserError as error:
        code = _report(str(error))
    except click.ClickException as error:
        code = _report(error.format_message())
    except (click.exceptions.Abort, KeyboardInterrupt):
        code = _report("interrupted")
    sys.exit(code)


def _report(message: str) -> int:
    # Ranks started together meet the same mistake: rank 0 tells it for all.
    if int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))) == 0:
        print("error: " + " ".join(message.split()), file=sys.stderr, flush=True)
    return 2
