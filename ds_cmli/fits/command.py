"""Whether any program's training fits on a GPU: `ds-cmli-memory fits -- SCRIPT ARGUMENTS`.

What stands behind `--` is what stands behind `python`. The program runs unchanged, on tensors
without data, until its optimizer steps are done.
"""

import json
from functools import partial
from pathlib import Path

import click

from ds_cmli.common import plots
from ds_cmli.common.cli import GroupedCommand, check_writable, option, run_command
from ds_cmli.common.errors import UserError
from ds_cmli.fits import largest


class ProgramCommand(GroupedCommand):
    """A command whose options end where the program begins."""

    allow_interspersed_args = False


@click.command(
    cls=ProgramCommand,
    context_settings={"help_option_names": ["-h", "--help"]},
    options_metavar="[OPTIONS] --",
)
@option("Device", "--gpu", help="A listed GPU.  [all are compared, with an A100's operators]")
@option("Device", "--limit", metavar="SIZE", help="A device's memory: 24GB (10^9 bytes) or 22GiB.")
@option("Program", "--steps", type=click.IntRange(1), default=2, show_default=True)
@option("Program", "--fit", is_flag=True, help="Find the largest number at {} in its arguments.")
@option("Program", "--world-size", type=click.IntRange(1), help="Ranks; it runs as one of them.")
@option("Program", "--rank", type=click.IntRange(0), default=0, show_default=True)
@option("Files", "--json", "json_path", type=click.Path(dir_okay=False), help="In bytes.")
@option("Files", "--snapshot", type=click.Path(dir_okay=False), help="For pytorch.org/memory_viz.")
@option("Files", "--plot", type=click.Path(dir_okay=False), help="A picture: .png or .svg.")
@click.argument("program", nargs=-1, type=click.UNPROCESSED, metavar="SCRIPT|-m MODULE [ARGS]...")
def command(
    gpu: str | None,
    limit: str | None,
    steps: int,
    fit: bool,
    world_size: int | None,
    rank: int,
    program: tuple[str, ...],
    **files: str | None,
) -> int:
    """Tell whether a PyTorch program's training fits on a GPU, without one."""
    if gpu and limit:
        raise UserError(f"--gpu is {gpu!r} and --limit {limit!r}: give one of them")
    if not program or program == ("-m",):
        raise UserError("no program is given: name its script behind --, or -m and its module")
    if program[0] != "-m" and not Path(program[0]).is_file():
        raise UserError(f"the script {program[0]!r} is not there: name a file, or -m and a module")
    if rank >= (world_size or 1):
        raise UserError(f"--rank is {rank} of --world-size {world_size or 1}: give one below it")
    for path in filter(None, (files["json_path"], files["snapshot"])):
        check_writable(path)
    plots.check_picture("--plot", files["plot"])
    if fit:
        if any(files.values()):
            raise UserError("--fit prints one sentence: leave out --json, --snapshot and --plot")
        ranks = [] if world_size is None else ["--world-size", str(world_size), "--rank", str(rank)]
        return _largest(gpu, limit, ["--steps", str(steps), *ranks], program)
    from ds_cmli.fits import guard

    guard.load()
    from ds_cmli.allocator import gpus
    from ds_cmli.allocator import snapshot as snapshots
    from ds_cmli.fits import program as running
    from ds_cmli.fits import report
    from ds_cmli.fits.steps import StepRecorder
    from ds_cmli.fits.values import Values
    from ds_cmli.fits.world import World

    rooms = report.rooms(gpu, limit)
    card = gpus.find(rooms[0].gpu)
    recorder, values = StepRecorder(card.limits, steps), Values()
    world = World(world_size, rank)
    ran = running.run(program, recorder, values, card, world)
    if ran.code:
        return ran.code
    answered = report.Report.of(recorder, rooms, world)
    name = program[1] if program[0] == "-m" else Path(program[0]).name
    print(answered.sentence(name))
    answered.show()
    for line in report.told(values, ran, recorder):
        print(line)
    if files["json_path"]:
        Path(files["json_path"]).write_text(json.dumps(answered.to_dict(), indent=2) + "\n")
    if files["snapshot"]:
        snapshots.write(answered.events, files["snapshot"])
    if files["plot"]:
        from ds_cmli.fits import picture

        title = f"{name} on {rooms[0]}"
        picture.draw(files["plot"], answered.events, answered.answers[0], rooms[0], title)
    return 0


def _largest(gpu: str | None, limit: str | None, more: list[str], program: tuple[str, ...]) -> int:
    largest.check(program, bool(gpu or limit))
    from ds_cmli.fits import report

    room = report.rooms(gpu, limit)[0]
    device = ["--gpu", gpu] if gpu else ["--limit", str(limit)]
    attempt = partial(largest.in_process_of_its_own, [*device, *more], program)
    number, tried = largest.largest(attempt)
    print(largest.sentence(number, tried, room, program))
    return 0


def main() -> None:
    run_command(command)
