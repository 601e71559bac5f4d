"""Scores of I images and J texts, and the match of a text's M tokens and a picture's N patches."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ds_cmli.cmli.sides import upcast


class BothWays(NamedTuple):
    """One kind of scores, fp32 [I, J] each (fp64 for fp64 features), each for its own ranking."""

    i2t: Tensor  # along a row: ranks the texts for an image; CMLI's are means over patches
    t2i: Tensor  # along a column: ranks the images for a text; CMLI's are means over tokens


def both_ways(
    cosines: Tensor, cmli: tuple[Tensor, Tensor] | None, scales: Mapping[str, float]
) -> dict[str, BothWays]:
    """All kinds: "global" of cosines [I, J], "cmli" of s_i2t and s_t2i if given, and "combined".

    That is the sum of the trained kinds, each times its 1/temperature in `scales`; if none is, as
    in a distillation alone, the cosines.
    """
    kinds = {"global": BothWays(cosines, cosines)}
    if cmli is not None:
        kinds["cmli"] = BothWays(*cmli)
    terms = [(scale, kinds[kind]) for kind, scale in (scales or {"global": 1.0}).items()]
    ways = [[scale * both[way] for scale, both in terms] for way in (0, 1)]
    return {**kinds, "combined": BothWays(*(reduce(torch.add, way) for way in ways))}


@dataclass
class Match:
    """The match of one text and one picture."""

    similarity: Tensor  # [M, N] fp32, cosines of tokens, without special ones, and patches
    words: list[str]  # the M tokens as pieces of the text
    spans: list[tuple[int, int]]  # their first characters in the text, and those after the last
    grid: tuple[int, int]  # rows and columns of patches, N = rows * columns


def match(words: Any, text: str, tokens: Tensor, patches: Tensor, grid: tuple[int, int]) -> Match:
    """Match `tokens` [M, D] of a text, whose tokenizer is `words`, with `patches` [N, D]. Sync."""
    spans = words(text).spans
    similarity = (upcast(tokens) @ upcast(patches).t()).cpu()
    return Match(similarity, [text[start:end] for start, end in spans], spans, grid)
