"""The kinds of pair scores, and the match of words and patches.

I images, J texts, N image patches, M tokens of a text, D embedding dimension.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from ds_cmli.cmli.op import upcast

Span = tuple[int, int]  # the first character and that after the last


class BothWays(NamedTuple):
    """One kind of scores, fp32 [I, J] each (fp64 for fp64 features), each for its own ranking."""

    i2t: Tensor  # along a row: ranks the texts for an image; CMLI's are means over patches
    t2i: Tensor  # along a column: ranks the images for a text; CMLI's are means over tokens


def combined(scores: Mapping[str, Tensor], scales: Mapping[str, float | Tensor]) -> Tensor:
    """The sum of the trained kinds of one direction, each times its 1/temperature in `scales`; if
    none is trained, as in a distillation alone, the cosines ("global")."""
    first, *others = [scale * scores[kind] for kind, scale in (scales or {"global": 1.0}).items()]
    return sum(others, start=first)


def both_ways(
    cosines: Tensor, cmli: tuple[Tensor, Tensor] | None, scales: Mapping[str, float | Tensor]
) -> dict[str, BothWays]:
    """All kinds: "global" of cosines [I, J], "cmli" of s_i2t and s_t2i if given, and "combined"."""
    kinds = {"global": BothWays(cosines, cosines)}
    if cmli is not None:
        kinds["cmli"] = BothWays(*cmli)
    ways = [{kind: both[way] for kind, both in kinds.items()} for way in (0, 1)]
    return {**kinds, "combined": BothWays(*(combined(way, scales) for way in ways))}


@dataclass
class Match:
    """The match of one text and one picture."""

    similarity: Tensor  # [M, N] fp32, cosines of tokens, without special ones, and patches
    words: list[str]  # the M tokens as pieces of the text
    spans: list[Span]  # their M places in the text
    grid: tuple[int, int]  # rows and columns of patches, N = rows * columns

    @property
    def patch_of_word(self) -> Tensor:
        """int64 [M], the patch that each word matches best, as row * columns + column."""
        return self.similarity.argmax(1)

    @property
    def word_of_patch(self) -> Tensor:
        """int64 [N], the word that each patch matches best."""
        return self.similarity.argmax(0)


def match(
    tokens: Tensor, patches: Tensor, text: str, spans: Sequence[Span], grid: tuple[int, int]
) -> Match:
    """Match tokens of a text [M, D] and patches [N, D], of unit length. CPU-GPU sync."""
    similarity = (upcast(tokens) @ upcast(patches).t()).cpu()
    return Match(similarity, [text[start:end] for start, end in spans], list(spans), grid)
