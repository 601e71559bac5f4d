"""Scores of I images and J texts, and the match of a text's M tokens and a picture's N patches."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ds_cmli.cmli.sides import upcast


class DirectionScores(NamedTuple):
    """One kind of scores, fp32 [I, J] each (fp64 for fp64 features), each for its own ranking."""

    i2t: Tensor  # along a row: ranks the texts for an image; CMLI's are means over patches
    t2i: Tensor  # along a column: ranks the images for a text; CMLI's are means over tokens


def all_kinds(
    cosines: Tensor, cmli: tuple[Tensor, Tensor] | None, scales: Mapping[str, float]
) -> dict[str, DirectionScores]:
    """Return "global", of the cosines [I, J], "cmli", of s_i2t and s_t2i if given, and "combined".

    "combined" sums the kinds in `scales`, each times its scale; without scales it is the cosines.
    """
    kinds = {"global": DirectionScores(cosines, cosines)}
    if cmli is not None:
        kinds["cmli"] = DirectionScores(*cmli)
    weights = scales or {"global": 1.0}
    i2t = reduce(torch.add, (scale * kinds[kind].i2t for kind, scale in weights.items()))
    t2i = reduce(torch.add, (scale * kinds[kind].t2i for kind, scale in weights.items()))
    return {**kinds, "combined": DirectionScores(i2t, t2i)}


@dataclass
class Match:
    """The match of one text and one picture."""

    similarity: Tensor  # [M, N] fp32, cosines of tokens, without special ones, and patches
    words: list[str]  # the M tokens as pieces of the text
    spans: list[tuple[int, int]]  # their first characters in the text, and those after the last
    grid: tuple[int, int]  # rows and columns of patches, N = rows * columns


def match(
    tokenizer: Any, text: str, tokens: Tensor, patches: Tensor, grid: tuple[int, int]
) -> Match:
    """Match `tokens` [M, D] of a text with `patches` [N, D]. CPU-GPU sync."""
    spans = tokenizer(text).spans
    similarity = (upcast(tokens) @ upcast(patches).t()).cpu()
    return Match(similarity, [text[start:end] for start, end in spans], spans, grid)
