"""Lines about what is unusual in the data: long or unknown captions, few of a picture."""

from collections.abc import Sequence
from contextlib import suppress

import numpy as np

from ds_cmli.data.sources.base import Source
from ds_cmli.data.tokens import CaptionTokenizer, most_characters

# About as many samples per source are checked for unknown tokens, in half a second.
LOOKED_AT = 5000
# Characters of a caption that is named as long, or `A_POSITION` for each position if that is more.
UNUSUAL = 1000
A_POSITION = 16


def oddities(sources: Sequence[Source], tokenizer: CaptionTokenizer, name: str) -> list[str]:
    """Lines about captions that are very long, or that the tokenizer `name` does not know."""
    long = [_long(source, tokenizer) for source in sources]
    # Each line once, as a source may be both trained on and evaluated on.
    return [*dict.fromkeys(filter(None, long)), *_unknown(sources, tokenizer, name)]


def _long(source: Source, tokenizer: CaptionTokenizer) -> str:
    """A line about the captions of more characters than usual; "" if there is none."""
    limit = max(UNUSUAL, A_POSITION * tokenizer.positions)
    sizes = source.caption_bytes()
    candidates = np.flatnonzero(sizes > limit)
    largest = candidates[np.argsort(-sizes[candidates], kind="stable")][:LOOKED_AT].tolist()
    long = []
    for index in largest:
        lengths = map(len, _captions(source, index))
        long += [(length, index) for length in lengths if length > limit]
    if not long:
        return ""
    longest, index = max(long)
    line = (
        f"{len(long)} captions of {source.where} have more than {limit:,} characters, the longest "
        f"{longest:,}, of {source.name(index)}: a model reads the first data.context_length = "
        f"{tokenizer.positions} tokens"
    )
    most = most_characters(tokenizer.positions)
    return line + (f", and no character after the first {most:,}" if longest > most else "")


def _unknown(sources: Sequence[Source], tokenizer: CaptionTokenizer, name: str) -> list[str]:
    """A line about captions in a language that the tokenizer does not know.

    Only some captions of large sources are read.
    """
    looked_at, unread = 0, []
    for source in sources:
        for index in range(0, len(source), max(1, len(source) // LOOKED_AT)):
            captions = _captions(source, index)
            looked_at += len(captions)
            unknown = sum(map(tokenizer.mostly_unknown, captions))
            unread += [(source, index)] * unknown
    if not unread:
        return []
    source, index = unread[0]
    return [
        f"{len(unread)} of {looked_at} captions looked at are mostly tokens that data.tokenizer = "
        f"{name!r} does not know, the first of {source.name(index)}: give a tokenizer of their "
        "language"
    ]


def _captions(source: Source, index: int) -> list[str]:
    with suppress(Exception):  # samples that cannot be read are reported when they are used
        return source.captions(index)
    return []
