"""python profiling/ablate.py PLAN.toml

Runs an ablation: a plan names arms, seeds, endpoints and contrasts. What is missing is trained, one
run after another, each in its own folder; started again after a signal, a crash or a kill, it goes
on where it was. A table has means, paired differences and their tests. Lines of the CSV file, one a
run, count as done on every machine. docs/learning.md says what a plan holds.
"""

if __name__ == "__main__" and not __package__:  # run by its path
    import by_path  # noqa: F401

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ds_cmli.common.cli import GroupedCommand, check_writable, option, run_command, say
from ds_cmli.common.errors import UserError
from ds_cmli.common.plots import check_picture
from ds_cmli.faults.preemption import EXIT_CODE

if TYPE_CHECKING:
    from profiling.learning.plan import Plan, Run


WIDTH = 180  # of the tables, in characters


@dataclass(frozen=True)
class Options:
    """The command's options."""

    out: Path | None
    csv: Path | None
    tuning: bool
    report: bool
    power: float | None
    task: int
    tasks: int
    markdown: str | None
    plot: str | None
    curve: tuple[str, str] | None


@click.command(cls=GroupedCommand, context_settings={"help_option_names": ["-h", "--help"]},
               help=__doc__.split("\n\n")[1])  # fmt: skip
@click.argument("plan", type=click.Path(path_type=Path))
@option("Runs", "--out", type=click.Path(path_type=Path), metavar="DIR",
        help="Holds a folder for each run.  [runs/ablate-<plan>, or ...-tuning]")  # fmt: skip
@option("Runs", "--csv", type=click.Path(path_type=Path), metavar="FILE",
        help="The runs, a line each.  [in the plan's folder]")  # fmt: skip
@option(
    "Runs",
    "--tuning",
    is_flag=True,
    help="The tuning seeds in place of the others, each arm at all points of its grid.",
)
@option("Runs", "--report", is_flag=True, help="Train nothing.")
@option("Runs", "--task", default=0, show_default=True, metavar="I",
        help="Train every N-th missing run from the I-th on, of 0 to N-1: a task of an array.")  # fmt: skip
@option("Runs", "--tasks", default=1, show_default=True, metavar="N", help="Tasks of the array.")
@option("Output", "--power", type=click.FloatRange(0, 1, min_open=True), metavar="DIFFERENCE",
        help="How many seeds would show such a difference, by the spread of those there.")  # fmt: skip
@option("Output", "--markdown", metavar="FILE", help="The table.")
@option("Output", "--plot", metavar="FILE", help="The differences as a picture.")
@option("Output", "--curve", nargs=2, metavar="COLUMN FILE",
        help="A column of metrics.jsonl over the steps as a picture, of the runs in --out.")  # fmt: skip
def command(plan: Path, **options: Any) -> int:
    return ablate(plan, Options(**options))


def ablate(path: Path, options: Options) -> int:
    """Train what is missing and report; returns the exit code."""
    check(options)
    from profiling.learning.plan import load

    plan = load(path, options.tuning)
    if any(name.startswith("style/") for name in plan.measured) and find_spec("resvg_py") is None:
        raise UserError("the endpoint style/mean_recall needs resvg-py: pip install -e '.[ablate]'")
    if options.power is not None and not plan.contrasts:
        raise UserError(f"--power is {options.power}: the plan has no contrasts, leave it out")
    from profiling.learning import records

    out = options.out or Path("runs") / f"ablate-{path.stem}{'-tuning' * options.tuning}"
    file = options.csv or path.with_suffix(".csv")
    runs = plan.runs()
    missing = records.missing(plan, runs, records.merge(plan, file, out))
    failures: list[str] | None = []
    if not options.report:
        say(f"{len(runs) - len(missing)} of {len(runs)} runs are done")
        # Which runs are a task's does not depend on what others have done meanwhile.
        own = [run for run in runs[options.task :: options.tasks] if run in missing]
        failures = train_missing(plan, own, out, file)
    if failures is None:
        say("stopped: start again in the same way to go on")
        return EXIT_CODE
    report(plan, runs, file, out, options)
    if failures:
        raise UserError(f"{len(failures)} runs failed, the first: {failures[0]}")
    return 0


def check(options: Options) -> None:
    """Raise `UserError` for what would fail only after the work."""
    task, tasks = options.task, options.tasks
    if not 0 <= task < tasks:
        raise UserError(f"--task is {task} and --tasks is {tasks}: give a task from 0 to N - 1")
    if find_spec("scipy") is None:
        raise UserError("an ablation's table needs scipy: pip install -e '.[ablate]'")
    curve = options.curve and options.curve[1]
    check_picture("--plot", options.plot)
    check_picture("--curve", curve)
    if options.markdown:
        check_writable(options.markdown)


def train_missing(plan: "Plan", runs: "list[Run]", out: Path, file: Path) -> list[str] | None:
    """Train runs and write their lines; returns as `train_all`."""
    from profiling.learning import records
    from profiling.learning.plan import AFTERWARDS
    from profiling.learning.runs import train_all

    def done(run: "Run", folder: Path) -> None:
        records.record(plan, run, folder)
        records.merge(plan, file, out)

    afterwards = [endpoint for endpoint in plan.measured if endpoint in AFTERWARDS]
    return train_all(runs, out, afterwards, done)


def report(plan: "Plan", runs: "list[Run]", file: Path, out: Path, options: Options) -> None:
    """Print the tables of the lines that are there, and write the requested files."""
    from rich.console import Console

    from profiling.learning import pictures, records
    from profiling.learning.report import (
        arms_table,
        compare,
        contrasts_table,
        power_table,
        runs_table,
        secondary_table,
        split_tables,
    )

    lines = records.merge(plan, file, out)
    compared = compare(plan, lines)
    tables = [runs_table(plan, lines), arms_table(plan, lines, plan.endpoints)]
    if compared:
        tables += [contrasts_table(compared), *split_tables(plan, lines, compared)]
    if plan.secondary:
        tables.append(arms_table(plan, lines, plan.secondary))
        tables.append(secondary_table(plan, lines))
    if compared and options.power is not None:
        tables.append(power_table(compared, options.power))
    for table in tables:
        table.show(Console(width=WIDTH))
    if options.markdown:
        text = "\n".join(table.markdown() for table in tables)
        Path(options.markdown).write_text(text, encoding="utf-8")
    if options.plot:
        pictures.draw_differences(compared, options.plot)
    if options.curve:
        pictures.draw_column(options.curve[0], runs, out, options.curve[1])


if __name__ == "__main__":
    run_command(command)
