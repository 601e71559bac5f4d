"""What a user is told of the data before a run: how much there is of each source, and what is odd about it."""

import contextlib
from collections.abc import Sequence

import numpy as np

from ds_cmli.data.bad import told
from ds_cmli.data.sources.base import Source
from ds_cmli.data.tokens import CaptionTokenizer, most_characters

LOOKED_AT = (
    5000  # about as many samples per source are checked for unknown tokens, in half a second
)
UNUSUAL = 1000  # characters of a caption that is told as long, or `A_POSITION` for each position where that is more
A_POSITION = 16


def counted(source: Source) -> str:
    """`"380 pictures with 1,520 captions"`."""
    counts = source.caption_counts()
    captions = "captions in .json" if counts is None else f"{int(counts.sum()):,} captions"
    return f"{len(source):,} pictures with {captions}"


def source_line(name: str, parts: Sequence[tuple[str, Source]], share: float | None = None) -> str:
    """The line about one source.

    Args:
        parts: what a part is for, such as "to train on", and the part.
        share: the share of an epoch's draws that the source has in a weighted mixture.
    """
    line = f"data: {name}: " + ", ".join(f"{counted(part)} {purpose}" for purpose, part in parts)
    bad = [item for part in {id(part): part for _, part in parts}.values() for item in part.bad]
    line += f", {share:.3g} of an epoch" if share is not None else ""
    return line + (
        f", {len(bad):,} left out, the first: {', '.join(told(bad))}" if bad else ", none left out"
    )


def oddities(sources: Sequence[Source], tokenizer: CaptionTokenizer, name: str) -> list[str]:
    """Lines about captions that are very long, or that the tokenizer, which `name` says, does not know."""
    return [*_long(sources, tokenizer), *_unknown(sources, tokenizer, name)]


def _long(sources: Sequence[Source], tokenizer: CaptionTokenizer) -> list[str]:
    limit = max(UNUSUAL, A_POSITION * tokenizer.positions)
    lines = []
    for source in sources:
        sizes = source.caption_bytes()
        candidates = np.flatnonzero(sizes > limit)
        largest = candidates[np.argsort(-sizes[candidates], kind="stable")][:LOOKED_AT].tolist()
        found = [(len(caption), index) for index in largest for caption in _captions(source, index)]
        found = [(length, index) for length, index in found if length > limit]
        if not found:
            continue
        longest, index = max(found)
        line = (
            f"{len(found)} captions of {source.where} have more than {limit:,} characters, the longest {longest:,}, "
            f"of {source.name(index)}: a model reads the first data.context_length = {tokenizer.positions} tokens"
        )
        most = most_characters(tokenizer.positions)
        lines.append(
            line + (f", and no character after the first {most:,}" if longest > most else "")
        )
    return list(dict.fromkeys(lines))  # a source may be both trained on and evaluated on


def _captions(source: Source, index: int) -> list[str]:
    with contextlib.suppress(
        Exception
    ):  # samples that cannot be read are reported when they are used
        return source.captions(index)
    return []


def _unknown(sources: Sequence[Source], tokenizer: CaptionTokenizer, name: str) -> list[str]:
    """A line about captions whose language the tokenizer does not know, if any; of large sources only some are read."""
    looked_at, found = 0, []
    for source in sources:
        for index in range(0, len(source), max(1, len(source) // LOOKED_AT)):
            captions = _captions(source, index)
            looked_at += len(captions)
            found += [
                source.name(index) for caption in captions if tokenizer.mostly_unknown(caption)
            ]
    if not found:
        return []
    return [
        f"{len(found)} of {looked_at} captions looked at are mostly tokens that data.tokenizer = {name!r} does "
        f"not know, the first of {found[0]}: give a tokenizer of their language"
    ]
