"""Pictures that several sources, or two parts of one, share: what is held out must not be trained on."""

from collections.abc import Sequence

import numpy as np

from ds_cmli.data.sources.base import Part, Source


def kept_apart(train: list[Source], held_out: Sequence[Source]) -> tuple[list[Source], list[str]]:
    """The training parts without the pictures of the parts that were held out, and a line for each that loses some."""
    taken = _all(held_out)
    kept, lines = [], []
    for source in train:
        stays = ~np.isin(source.identities(), taken)
        lost = len(source) - int(stays.sum())
        if lost:
            lines.append(
                f"{lost} pictures of {source.where} are held out under another name too: not trained on"
            )
            source = Part(source, np.flatnonzero(stays).astype(np.uint32), source.bad)
        kept.append(source)
    return kept, lines


def shared_lines(train: Sequence[Source], evaluated: Sequence[Source]) -> list[str]:
    """Lines about pictures that several training parts share, and about those that are trained on and evaluated on."""
    lines = []
    identities = [source.identities() for source in train]
    for number, source in enumerate(train[1:], 1):
        common = int(np.isin(identities[number], np.concatenate(identities[:number])).sum())
        if common:
            lines.append(
                f"{common} of {len(source)} pictures of {source.where} are in another source too: an epoch takes them "
                "from each, and they are no negatives of themselves"
            )
    trained = _all(train)
    for source in evaluated:
        common = int(np.isin(source.identities(), trained).sum())
        if common:
            lines.append(
                f"{common} of {len(source)} pictures of {source.where} are trained on and evaluated on: their results "
                "say nothing of others"
            )
    return lines


def _all(sources: Sequence[Source]) -> np.ndarray:
    return np.concatenate([np.zeros(0, np.uint64), *(source.identities() for source in sources)])
