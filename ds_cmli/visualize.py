"""Draws match maps, a PNG for each pair: `python -m ds_cmli.visualize RUN --pairs 0,1,2`.

For each word of a caption they show its best patches of the picture, for each patch its best word;
those of several runs are shown side by side, on the same pairs.

Shapes: S image side in pixels, N image patches, M words.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ds_cmli.common.cli import run_command
from ds_cmli.common.errors import UserError
from ds_cmli.config.plugins import plugin_option

if TYPE_CHECKING:
    from torch import Tensor

    from ds_cmli.config.schema import Config
    from ds_cmli.inference import Match, Model

DEFAULT = 4  # pairs that are shown if none are given


@dataclass
class Panel:
    """One caption and its picture, with the matches of one or several models."""

    text: str
    image: Tensor  # uint8 [3, S, S]
    matches: dict[str, Match]  # model's name -> its match; all have the same words


@dataclass(frozen=True)
class MatchMapOptions:
    """The options of the command."""

    runs: tuple[str, ...]
    source: str | None
    split: str | None
    pairs: str | None
    image: str | None
    text: str | None
    output: str


@click.command()
@plugin_option
@click.argument("runs", nargs=-1, required=True, metavar="RUN [RUN ...]")
@click.option(
    "--data", "source", default=None, help="Data as in training.  [default: the first run's]"
)
@click.option("--split", default=None, help="Held-out part.  [default: the first]")
@click.option(
    "--pairs",
    default=None,
    metavar="0,1,2",
    help="Numbers of pairs: each picture with its first caption, then each with its second.  "
    "[default: the first four]",
)
@click.option("--image", default=None, help="Picture to show instead of --pairs; needs --text.")
@click.option("--text", default=None, help="The text for --image.")
@click.option(
    "--output",
    default="match-maps",
    show_default=True,
    metavar="FOLDER",
    help="Folder for a PNG of each pair.",
)
def command(**options: Any) -> None:
    """Show what each word of a caption finds in its picture, and each patch in the caption."""
    chosen = MatchMapOptions(**options)
    if (chosen.image is None) != (chosen.text is None):
        raise UserError("--image and --text belong together: give both, or --pairs")
    if chosen.image is not None and chosen.pairs is not None:
        raise UserError("--pairs has no effect with --image: leave it out")
    numbers = None
    if chosen.pairs is not None:
        numbers = list(map(_number, chosen.pairs.split(",")))
    folder = Path(chosen.output)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"--output is {chosen.output!r}: cannot make it: {error.strerror}"
        ) from None

    from ds_cmli.inference import Model

    models = {_name(run, chosen.runs): Model.load(run) for run in chosen.runs}
    first = next(iter(models.values()))
    if chosen.image is not None and chosen.text is not None:
        shown = [(first.read(chosen.image), chosen.text)]
    else:
        shown = held_out(first.config, chosen.source, chosen.split, numbers)
    panels = [panel(models, pixels, caption) for pixels, caption in shown]
    for number, one in enumerate(panels):
        write_figure(one, folder / f"match-{number}.png")
    many = "s" if len(panels) > 1 else ""
    click.echo(f"match maps of {len(panels)} pair{many}: {chosen.output}")


def _number(part: str) -> int:
    if not part.strip().isdigit():
        raise UserError(f"--pairs has {part!r}: give numbers from 0 on, separated by commas")
    return int(part)


def _name(run: str, runs: tuple[str, ...]) -> str:
    """The name of the run's folder, or its path as given if two folders have the same name."""
    names = {Path(other).resolve().name for other in runs}
    if len(names) == len(runs):
        return Path(run).resolve().name
    return run


def held_out(
    config: Config, source: str | None, split: str | None, numbers: Sequence[int] | None
) -> list[tuple[Tensor, str]]:
    """Pairs of a held-out split, as (picture uint8 [3, S, S], caption as it is written).

    Args:
        numbers: as `in_turns` counts them; None: the first `DEFAULT` that can be used.

    Raises:
        UserError: there is no such split or pair, or a pair cannot be used.
    """
    from ds_cmli.data.build import build_eval_data, evaluation_data
    from ds_cmli.evaluate.held_out import HeldOut

    if source is not None:
        config = dataclasses.replace(config, data=evaluation_data(config.data, source))
    data = build_eval_data(config.data, config.run.seed, None)
    if not data.evals:
        raise UserError(f"--data is {config.data.source!r}: it has no held-out part")
    split = split or next(iter(data.evals))
    if split not in data.evals:
        raise UserError(f"--split is {split!r}: give one of {', '.join(data.evals)}")
    pairs = HeldOut(data.evals[split])
    order = in_turns(pairs.image_of.tolist())
    out: list[tuple[Tensor, str]] = []
    for number in range(len(order)) if numbers is None else numbers:
        if number >= len(order):
            raise UserError(f"--pairs has {number}: {split} has {len(order)} pairs, from 0 on")
        row = order[number]
        sample = pairs.pairs.pair(pairs.rows[row])
        if sample.bad is None:
            out.append((sample.image, sample.tokens.text))
        elif numbers is not None:
            name, reason = sample.bad
            raise UserError(f"--pairs has {number}, which cannot be used: {name}: {reason}")
        if numbers is None and len(out) == DEFAULT:
            break
    if not out:
        raise UserError(f"--split is {split!r}: none of its {len(order)} pairs can be used")
    return out


def in_turns(image_of: Sequence[int]) -> list[int]:
    """The order in which pairs are counted: each picture's first caption, then each one's second.

    So the first pairs show different pictures.

    Args:
        image_of: the number of each caption's picture.
    """
    seen: dict[int, int] = {}
    turns = []
    for caption, picture in enumerate(image_of):
        seen[picture] = seen.get(picture, -1) + 1
        turns.append((seen[picture], caption))
    return [caption for _, caption in sorted(turns)]


def panel(models: Mapping[str, Model], image: Tensor, text: str) -> Panel:
    """The panel of a picture [3, S, S] and a text, with the match of each model.

    Raises:
        UserError: a model cannot read the picture or knows no word of the text, or two models
            divide it differently.
    """
    matches: dict[str, Match] = {}
    for name, model in models.items():
        match = model.match(image, text)
        if not match.words:
            raise UserError(f"the text is {text!r}, of which {name} knows no word")
        first = next(iter(matches.values()), match)
        if match.spans != first.spans:
            raise UserError(
                f"{name} divides {text!r} into other words than {next(iter(matches))}: show them "
                "one by one"
            )
        matches[name] = match
    return Panel(text, image, matches)


def write_figure(panel: Panel, path: str | Path) -> None:
    """Draw a panel as a picture for a paper or a slide, with a block for each model.

    Raises:
        UserError: the file cannot be written.
    """
    from ds_cmli.evaluate.match_maps import sheet

    matches = dict(panel.matches)
    if len(matches) == 1:
        matches = {"": next(iter(matches.values()))}  # a single model is not named
    try:
        sheet(panel.image, panel.text, matches).save(path, optimize=True)
    except (OSError, ValueError) as error:
        raise UserError(f"the picture is {str(path)!r}: cannot write it: {error}") from None


def main() -> None:
    run_command(command)


if __name__ == "__main__":
    main()
