"""Whether any program's training fits on a GPU: `ds-cmli-memory fits -- SCRIPT ARGUMENTS`.

What stands behind `--` is what stands behind `python`. The program runs unchanged, on tensors
without data, until its optimizer steps are done.
"""

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ds_cmli.common import plots
from ds_cmli.common.cli import (
    DOES_NOT_FIT,
    GroupedCommand,
    check_writable,
    option,
    run_command,
)
from ds_cmli.common.errors import UserError
from ds_cmli.fits import largest

if TYPE_CHECKING:
    from ds_cmli.fits.answer import Room
    from ds_cmli.fits.world import World


ENGINES = ("fake", "null")


class ProgramCommand(GroupedCommand):
    """A command whose options end where the program begins."""

    allow_interspersed_args = False

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Take `-m` for the program's beginning, as `--` is."""
        if "-m" in args:
            before = args[: args.index("-m")]
            given, _, _ = self.make_parser(ctx).parse_args([*before])
            program = given["program"]  # without any, a mark of click's that is no tuple
            if "--" not in before and not (isinstance(program, tuple) and program):
                args = [*before, "--", *args[len(before) :]]
        return super().parse_args(ctx, args)


@click.command(
    cls=ProgramCommand,
    context_settings={"help_option_names": ["-h", "--help"]},
    options_metavar="[OPTIONS] --",
)
@option("Device", "--gpu", help="GPU by name.  [all are compared, with an A100's operators]")
@option("Device", "--limit", metavar="SIZE", help="A device's memory: 24GB (10^9 bytes) or 22GiB.")
@option("Program", "--steps", type=click.IntRange(1), default=2, show_default=True, help="To run.")
@option("Program", "--fit", is_flag=True, help="Find the largest number that fits in place of {}.")
@option("Program", "--world-size", type=click.IntRange(1), help="Number of ranks.  [no launcher]")
@option("Program", "--rank", type=click.IntRange(0), default=0, show_default=True, help="Its rank.")
@option(
    "Program",
    "--engine",
    type=click.Choice(ENGINES),
    default="fake",
    show_default=True,
    help="fake: tensors without data; null: the CUDA build of torch on the null GPU.",
)
@option("Files", "--json", "json_path", type=click.Path(dir_okay=False), help="Figures in bytes.")
@option("Files", "--snapshot", type=click.Path(dir_okay=False), help="For pytorch.org/memory_viz.")
@option("Files", "--plot", type=click.Path(dir_okay=False), help="Picture: .png or .svg.")
@click.argument("program", nargs=-1, type=click.UNPROCESSED, metavar="SCRIPT|-m MODULE [ARGS]...")
def command(
    gpu: str | None,
    limit: str | None,
    steps: int,
    fit: bool,
    world_size: int | None,
    rank: int,
    program: tuple[str, ...],
    **named: str | None,
) -> int:
    """Predict whether a PyTorch program's training fits on a GPU, without one."""
    if gpu and limit:
        raise UserError(f"--gpu is {gpu!r} and --limit {limit!r}: give one of them")
    check_program(program)
    if rank >= (world_size or 1):
        raise UserError(f"--rank is {rank} of --world-size {world_size or 1}: give one below it")
    engine, files = named.pop("engine"), named
    for path in filter(None, (files["json_path"], files["snapshot"])):
        check_writable(path)
    plots.check_picture("--plot", files["plot"])
    if engine == "null" and files["plot"]:
        raise UserError("--plot draws categories, which --engine null does not know: leave one out")
    if engine == "null" and not (gpu or limit):
        raise UserError("--engine null runs on one device: give --gpu or --limit")
    if fit:
        if any(files.values()):
            raise UserError("--fit prints one sentence: leave out --json, --snapshot and --plot")
        ranks = [] if world_size is None else ["--world-size", str(world_size), "--rank", str(rank)]
        more = ["--steps", str(steps), "--engine", str(engine), *ranks]
        return _largest(gpu, limit, more, program)
    if engine == "fake":
        from ds_cmli.fits import guard

        guard.load()
    from ds_cmli.fits import report
    from ds_cmli.fits.world import World

    rooms, world = report.rooms(gpu, limit), World(world_size, rank)
    if engine == "fake":
        return _without_data(program, rooms, steps, world, files)
    from ds_cmli.fits import null_gpu

    answer = null_gpu.answer(null_gpu.NullGpu(rooms[0], steps, world), program, files["snapshot"])
    answer.show(_name(program))
    _write(files["json_path"], answer.to_dict())
    return 0 if answer.fits else DOES_NOT_FIT


def check_program(program: tuple[str, ...]) -> None:
    """Raise `UserError` where the words name no program."""
    if not program or program == ("-m",):
        raise UserError("no program is given: name its script behind --, or -m and its module")
    if program[0] != "-m" and not Path(program[0]).is_file():
        instead = "name the file that Python runs, without its launcher, or -m and a module"
        raise UserError(f"the script {program[0]!r} is not there: {instead}")


def _name(program: Sequence[str]) -> str:
    return program[1] if program[0] == "-m" else Path(program[0]).name


def _write(path: str | None, answer: dict[str, object]) -> None:
    if path:
        Path(path).write_text(json.dumps(answer, indent=2) + "\n")


def _without_data(
    program: Sequence[str],
    rooms: list["Room"],
    steps: int,
    world: "World",
    files: dict[str, str | None],
) -> int:
    from ds_cmli.allocator import gpus
    from ds_cmli.allocator import snapshot as snapshots
    from ds_cmli.fits import program as running
    from ds_cmli.fits import report
    from ds_cmli.fits.steps import StepRecorder
    from ds_cmli.fits.values import Values

    card = gpus.find(rooms[0].gpu)
    recorder, values = StepRecorder(card.limits, steps), Values(world.rank)
    ran = running.run(program, recorder, values, card, world)
    if ran.code:
        return ran.code
    answered = report.ProgramReport.of(recorder, rooms, world)
    print(answered.sentence(_name(program)))
    answered.show()
    for line in report.told(values, ran, recorder):
        print(line)
    _write(files["json_path"], answered.to_dict())
    if files["snapshot"]:
        snapshots.write(answered.events, files["snapshot"])
    if files["plot"]:
        title = f"{_name(program)} on {rooms[0]}"
        report.draw_events(files["plot"], answered.events, answered.answers[0], rooms[0], title)
    return 0 if answered.fits else DOES_NOT_FIT


def _largest(gpu: str | None, limit: str | None, more: list[str], program: tuple[str, ...]) -> int:
    largest.check(program, bool(gpu or limit))
    from ds_cmli.fits import report

    room = report.rooms(gpu, limit)[0]
    device = ["--gpu", gpu] if gpu else ["--limit", str(limit)]
    attempt = partial(largest.in_process_of_its_own, [*device, *more], program)
    number, tried = largest.largest(attempt)
    waited_for = tried[number].waited_for if number else ()
    print(largest.sentence(number, tried, room, program) + report.not_counted(waited_for))
    return 0 if number and not waited_for else DOES_NOT_FIT


def main() -> None:
    run_command(command)
