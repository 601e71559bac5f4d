"""Draws match maps, a PNG for each pair: `python -m ds_cmli.visualize RUN --pairs 0,1,2`.

S is the image side in pixels.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ds_cmli.common import UserError, one_line, run_command
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
    help="Numbers of pairs: each picture with its first caption, then each with its second.  "
    "[default: the first four]",
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
        if not pairs.replace(",", "").isdigit():
            raise UserError(f"--pairs is {pairs!r}: give numbers from 0 on, separated by commas")
        numbers = [int(number) for number in pairs.split(",") if number]
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
    """Pairs of a held-out split, as (picture uint8 [3, S, S], caption as it is written).

    `numbers` count each picture's first caption, then each one's second; None: the first `DEFAULT`
    that can be used. Raises `UserError`.
    """
    from ds_cmli.data.build import build_eval_data, evaluation_data
    from ds_cmli.evaluate.embed import pictures_of

    data = config.data if source is None else evaluation_data(config.data, source)
    evals, _ = build_eval_data(data, config.run.seed, None)
    split = split or next(iter(evals))
    if split not in evals:
        raise UserError(f"--split is {split!r}: give one of {', '.join(evals)}")
    pairs, before, turns = evals[split], Counter[int](), []
    for row, picture in enumerate(pictures_of(pairs)):
        turns.append((before[picture], row))
        before[picture] += 1
    rows = [row for _, row in sorted(turns)]
    shown: list[tuple[Tensor, str]] = []
    for number in range(len(rows)) if numbers is None else numbers:
        try:
            shown.append((pairs.image(rows[number]), pairs.rows[rows[number]][1]))
        except Exception as error:  # decoders raise nearly any for damaged files
            if numbers is not None:
                why = f"the {len(rows)} of {split} are from 0 on: {one_line(error)}"
                raise UserError(f"--pairs has {number}, which cannot be used, and {why}") from None
        if numbers is None and len(shown) == DEFAULT:
            break
    return shown


def main() -> None:
    run_command(command)


if __name__ == "__main__":
    main()
