"""Draws match maps, a PNG for each pair: `python -m ds_cmli.visualize RUN --pairs 0,1,2`."""

from pathlib import Path
from typing import Any

import click

from ds_cmli.commands import noun, run_command
from ds_cmli.config.registry import plugin_option
from ds_cmli.config.schema import Config
from ds_cmli.errors import UserError, blame

PAIRS_HELP = "Numbers of held-out pictures, each with its first caption."


@click.command()
@plugin_option
@click.argument("run", metavar="RUN")
@click.option("--pairs", default="0,1,2,3", show_default=True, help=PAIRS_HELP)
@click.option("--image", help="Picture to show instead of --pairs; needs --text.")
@click.option("--text", help="The text for --image.")
@click.option("--output", default="match-maps", show_default=True, metavar="FOLDER")
def command(run: str, pairs: str, image: str | None, text: str | None, output: str) -> None:
    """Show what each word of a caption finds in its picture."""
    if (image is None) != (text is None):
        raise UserError("--image and --text belong together: give both, or --pairs")

    from ds_cmli.evaluate.match_map import sheet
    from ds_cmli.inference import Model

    model = Model.load(run)
    if image is not None and text is not None:
        pairs_to_draw = [(model.read(image), text)]
    else:
        pairs_to_draw = held_out_pairs(model.config, pairs)
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    for number, (pixels, caption) in enumerate(pairs_to_draw):
        picture = sheet(pixels, caption, model.match(pixels, caption))
        picture.save(folder / f"match-{number}.png", optimize=True)
    click.echo(f"match maps of {len(pairs_to_draw)} {noun(len(pairs_to_draw), 'pair')}: {output}")


def held_out_pairs(config: Config, numbers: str) -> list[tuple[Any, str]]:
    """Return the held-out pictures of these numbers, uint8 [3, S, S], with their first captions."""
    from ds_cmli.data.build import build_eval_data
    from ds_cmli.evaluate.embed import pictures_of

    eval_sets, _ = build_eval_data(config.data, config.run.seed, None)
    (split, data), *_ = eval_sets.items()  # the first held-out set
    rows = list(dict.fromkeys(pictures_of(data)))  # of each picture, the row of its first caption
    captions = [caption for _, caption in data.rows]
    with blame(f"--pairs is {numbers!r}: give numbers of the {len(rows)} pictures of {split}"):
        chosen_rows = [rows[int(number)] for number in numbers.split(",")]
        return [(data.image(row), captions[row]) for row in chosen_rows]


def main() -> None:
    run_command(command)


if __name__ == "__main__":
    main()
