"""Draws match maps, a PNG for each pair: `python -m ds_cmli.visualize RUN --pairs 0,1,2`.

S is the image side in pixels.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ds_cmli.common import UserError, blame, run_command
from ds_cmli.config.registry import plugin_option

if TYPE_CHECKING:
    from torch import Tensor

    from ds_cmli.config.schema import Config

DEFAULT = 4  # pairs that are shown if none are given


@click.command()
@plugin_option
@click.argument("run", metavar="RUN")
@click.option("--data", help="Data as in training.  [default: the run's]")
@click.option("--split", help="Held-out part.  [default: the first]")
@click.option(
    "--pairs",
    metavar="0,1,2",
    help="Numbers of pictures, each with its first caption.  [default: the first four]",
)
@click.option("--image", help="Picture to show instead of --pairs; needs --text.")
@click.option("--text", help="The text for --image.")
@click.option("--output", default="match-maps", show_default=True, metavar="FOLDER")
def command(
    run: str,
    data: str | None,
    split: str | None,
    pairs: str | None,
    image: str | None,
    text: str | None,
    output: str,
) -> None:
    """Show what each word of a caption finds in its picture, and each patch in the caption."""
    if (image is None) != (text is None) or (image is not None and pairs is not None):
        raise UserError("--image and --text belong together: give both, or --pairs")
    numbers = None
    if pairs is not None:
        with blame(f"--pairs is {pairs!r}: give numbers from 0 on, separated by commas"):
            numbers = [int(number) for number in pairs.split(",")]
    Path(output).mkdir(parents=True, exist_ok=True)

    from ds_cmli.evaluate.match_map import sheet
    from ds_cmli.inference import Model

    model = Model.load(run)
    if image is not None and text is not None:
        shown = [(model.read(image), text)]
    else:
        shown = held_out(model.config, data, split, numbers)
    for number, (pixels, caption) in enumerate(shown):
        picture = sheet(pixels, caption, model.match(pixels, caption))
        picture.save(Path(output) / f"match-{number}.png", optimize=True)
    click.echo(f"match maps of {len(shown)} pair{'s'[: len(shown) != 1]}: {output}")


def held_out(
    config: Config, source: str | None, split: str | None, numbers: list[int] | None
) -> list[tuple[Tensor, str]]:
    """The pictures of these numbers, uint8 [3, S, S], each with its first caption; None: the first
    `DEFAULT` that can be used. Raises `UserError`.
    """
    from ds_cmli.data.build import build_eval_data, evaluation_data
    from ds_cmli.evaluate.embed import pictures_of

    data = config.data if source is None else evaluation_data(config.data, source)
    evals, _ = build_eval_data(data, config.run.seed, None)
    split = split or next(iter(evals))
    if split not in evals:
        raise UserError(f"--split is {split!r}: give one of {', '.join(evals)}")
    pairs = evals[split]
    rows, shown = list(dict.fromkeys(pictures_of(pairs))), []
    problem = f"--pairs is {numbers}, of the {len(rows)} pictures of {split}"
    for number in range(len(rows)) if numbers is None else numbers:
        with suppress(Exception) if numbers is None else blame(problem):
            shown.append((pairs.image(rows[number]), pairs.rows[rows[number]][1]))
        if numbers is None and len(shown) == DEFAULT:
            break
    return shown


def main() -> None:
    run_command(command)


if __name__ == "__main__":
    main()
