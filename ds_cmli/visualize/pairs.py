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


def held_out(
    config: Config, source: str | None, split: str | None, numbers: Sequence[int]
) -> list[tuple[str, Tensor, str]]:
    """Pairs of a held-out split, as (title, picture uint8 [3, S, S], caption).

    Raises:
        UserError: there is no such split or pair, or a pair cannot be used.
    """
    from ds_cmli.data import build_data

    if source is not None:
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, source=source))
    data = build_data(config.data, config.run.seed)
    if not data.evals:
        raise UserError(f"--data is {config.data.source!r}: it has no held-out part")
    split = split or next(iter(data.evals))
    if split not in data.evals:
        raise UserError(f"--split is {split!r}: give one of {', '.join(data.evals)}")
    dataset = data.evals[split]
    out = []
    for number in numbers:
        if number >= len(dataset):  # type: ignore[arg-type]
            raise UserError(f"--pairs has {number}: {split} has {len(dataset)} pairs, from 0 on")  # type: ignore[arg-type]
        sample = dataset[number]
        if sample.bad is not None:
            raise UserError(f"--pairs has {number}, which cannot be used: {sample.bad[0]}: {sample.bad[1]}")
        valid = [i for i, v in zip(sample.tokens.input_ids, sample.tokens.valid, strict=True) if v]
        out.append((f"{split} {number}", sample.image, data.tokenizer.decode(valid)))
    return out


def panel(models: Mapping[str, Model], title: str, image: Tensor, text: str) -> Panel:
    """The panel of a picture [3, S, S] and a text, with the match of each model.

    Raises:
        UserError: a model cannot read the picture or knows no word of the text, or two models divide it differently.
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
