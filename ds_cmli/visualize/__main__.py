"""`python -m ds_cmli.visualize RUN --pairs 0,1,2` draws match maps of held-out pairs, as one page
and as pictures.

The maps of several runs are shown side by side, on the same pairs.
"""

from pathlib import Path

import click

from ds_cmli.common.cli import run_command
from ds_cmli.common.errors import UserError


@click.command()
@click.argument("runs", nargs=-1, required=True, metavar="RUN [RUN ...]")
@click.option(
    "--data", "source", default=None, help="As of a training.  [default: the first run's own]"
)
@click.option("--split", default=None, help="Which held-out part.  [default: the first]")
@click.option(
    "--pairs",
    default=None,
    metavar="0,1,2",
    help="Numbers of pairs: each picture with its first caption, then each with its second.  "
    "[default: the first four]",
)
@click.option("--image", default=None, help="A picture's file instead of --pairs; needs --text.")
@click.option("--text", default=None, help="The text for --image.")
@click.option("--output", default="match-maps.html", show_default=True, help="The page.")
@click.option(
    "--pictures", default=None, metavar="FOLDER", help="Also a PNG of each pair, in this folder."
)
def command(
    runs: tuple[str, ...],
    source: str | None,
    split: str | None,
    pairs: str | None,
    image: str | None,
    text: str | None,
    output: str,
    pictures: str | None,
) -> None:
    """Show what each word of a caption finds in its picture, and each patch in the caption."""
    from ds_cmli.common.cli import check_writable

    if (image is None) != (text is None):
        raise UserError("--image and --text belong together: give both, or --pairs")
    if image is not None and pairs is not None:
        raise UserError("--pairs has no effect beside --image: leave it out")
    numbers = None if pairs is None else [_number(part) for part in pairs.split(",")]
    check_writable(output)

    from ds_cmli.inference import Model
    from ds_cmli.visualize import write_figure, write_page
    from ds_cmli.visualize.pairs import held_out, panel

    models = {_name(run, runs): Model.load(run) for run in runs}
    first = next(iter(models.values()))
    if image is not None and text is not None:
        asked = [(Path(image).name, first.read(image), text)]
    else:
        asked = held_out(first.config, source, split, numbers)
    panels = [panel(models, title, pixels, caption) for title, pixels, caption in asked]
    write_page(panels, output)
    click.echo(f"match maps of {len(panels)} pair{'s' if len(panels) > 1 else ''}: {output}")
    if pictures is not None:
        try:
            Path(pictures).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"--pictures is {pictures!r}: cannot make it: {error.strerror}"
            ) from None
        for number, one in enumerate(panels):
            write_figure(one, Path(pictures) / f"match-{number}.png")
        click.echo(f"pictures of them: {pictures}")


def _number(part: str) -> int:
    if not part.strip().isdigit():
        raise UserError(f"--pairs has {part!r}: give numbers from 0 on, separated by commas")
    return int(part)


def _name(run: str, runs: tuple[str, ...]) -> str:
    """The name of the run's folder, or its path as it was given if two runs' folders have the same
    name.
    """
    names = [Path(other).resolve().name for other in runs]
    return Path(run).resolve().name if len(set(names)) == len(names) else run


if __name__ == "__main__":
    run_command(command)
