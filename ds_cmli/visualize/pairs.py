"""Finds held-out pairs to show, and makes the panel of a pair.

Shapes: S image side in pixels.
"""

import dataclasses
from collections.abc import Mapping, Sequence

from torch import Tensor

from ds_cmli.common.errors import UserError
from ds_cmli.config.schema import Config
from ds_cmli.inference.model import Match, Model
from ds_cmli.visualize.page import Panel

DEFAULT = 4  # pairs that are shown if none are asked for


def held_out(
    config: Config, source: str | None, split: str | None, numbers: Sequence[int] | None
) -> list[tuple[str, Tensor, str]]:
    """Pairs of a held-out split, as (title, picture uint8 [3, S, S], caption as it is written).

    Args:
        numbers: as `in_turns` counts them; None: the first `DEFAULT` that can be used.

    Raises:
        UserError: there is no such split or pair, or a pair cannot be used.
    """
    from ds_cmli.data.load import build_data
    from ds_cmli.evaluate.held_out import HeldOut

    if source is not None:
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, source=source))
    data = build_data(config.data, config.run.seed)
    if not data.evals:
        raise UserError(f"--data is {config.data.source!r}: it has no held-out part")
    split = split or next(iter(data.evals))
    if split not in data.evals:
        raise UserError(f"--split is {split!r}: give one of {', '.join(data.evals)}")
    pairs = HeldOut(data.evals[split])
    order = in_turns(pairs.image_of.tolist())
    out: list[tuple[str, Tensor, str]] = []
    for number in range(len(order)) if numbers is None else numbers:
        if number >= len(order):
            raise UserError(f"--pairs has {number}: {split} has {len(order)} pairs, from 0 on")
        sample = pairs.pairs.pair(pairs.rows[order[number]])
        if sample.bad is None:
            out.append(
                (title(split, number, pairs.file(order[number])), sample.image, sample.tokens.text)
            )
        elif numbers is not None:
            name, reason = sample.bad
            raise UserError(f"--pairs has {number}, which cannot be used: {name}: {reason}")
        if numbers is None and len(out) == DEFAULT:
            break
    if not out:
        raise UserError(f"--split is {split!r}: none of its {len(order)} pairs can be used")
    return out


def in_turns(image_of: Sequence[int]) -> list[int]:
    """Captions in the order in which pairs are counted: each picture's first caption, then each
    one's second.

    So the first pairs show different pictures. `image_of`: the number of each caption's picture.
    """
    seen: dict[int, int] = {}
    turns = []
    for caption, picture in enumerate(image_of):
        seen[picture] = seen.get(picture, -1) + 1
        turns.append((seen[picture], caption))
    return [caption for _, caption in sorted(turns)]


def title(split: str, number: int, file: str) -> str:
    return f"{split} {number}" if file.isdigit() else f"{split} {number}: {file}"


def panel(models: Mapping[str, Model], title: str, image: Tensor, text: str) -> Panel:
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
                f"{name} divides {text!r} into other words than {next(iter(matches))}: show them in two pages"
            )
        matches[name] = match
    return Panel(title, text, image, matches)
