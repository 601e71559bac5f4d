"""Opening the sources that a configuration names, and deciding which parts are trained on and which are held out."""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ds_cmli.common.errors import UserError
from ds_cmli.config.registry import SOURCES, load
from ds_cmli.config.schema import DataConfig
from ds_cmli.data import sources
from ds_cmli.data.bad import told
from ds_cmli.data.sampler import Mixture
from ds_cmli.data.sources.base import Part, Parts, Source, hold_out
from ds_cmli.data.sources.names import weighted
from ds_cmli.data.tokens import CaptionTokenizer, most_characters

OF_SOURCES = (
    "image_root",
    "image_key",
    "caption_key",
    "separator",
)  # settings that only some sources read

FOLLOWING = {"folder", "csv", "json"}  # the kinds whose pictures are files of their own


@dataclass
class Opened:
    train: list[Source] = field(default_factory=list)
    validation: list[Source] = field(default_factory=list)
    weights: list[float] | None = None
    mixture: Mixture = field(default_factory=lambda: Mixture([0]))
    summary: list[str] = field(default_factory=list)  # a line for each source
    of_files: list[str] = field(default_factory=list)  # lines about what the files hold
    notices: list[str] = field(default_factory=list)  # those, and lines about what becomes of it
    fingerprint: dict[str, Any] = field(default_factory=dict)


def open_sources(config: DataConfig) -> Opened:
    """Open every source of `data.source` for training, and the validation data.

    Validation uses `data.val_source` if given, else each source's own validation part, else a held-out share of it.
    Pictures that are held out of one source are not trained on from another.

    Raises:
        UserError: an error of a source, a part without a picture, or a setting that no source reads.
    """
    names, weights = weighted(config.source)
    opened, kinds = Opened(weights=weights), set[str]()
    held_out: list[Source] = []
    for name in names:
        parts = _open(name, config, kinds)
        train, validation = (
            parts.train,
            None if config.val_source else _evaluated(parts, name, config),
        )
        for split, part in (("validation", parts.validation), ("test", parts.test)):
            if part is not None and part is not validation and name != config.val_source:
                opened.notices.append(f"the {split} part of {name} is not used")
        if not config.val_source:
            if validation is None:
                train, validation = hold_out(train)
                held_out.append(validation)
            opened.validation.append(validation)
        opened.train.append(train)
        opened.of_files += parts.notices
    if config.val_source:
        opened.validation = [_open_val_source(config, names, kinds, opened)]
    if config.follow_symlinks and not kinds & FOLLOWING:
        opened.notices.append(
            f"data.follow_symlinks has no effect: {' and '.join(sorted(kinds))} holds its pictures"
        )
    opened.train, lines = kept_apart(opened.train, held_out)
    for part in (*opened.train, *opened.validation):
        if not len(part):
            raise UserError(f"{part.where} has no picture left: give it some, or leave it out")
    overlaps = [*lines, *shared_lines(opened.train, opened.validation)]
    opened.notices = [*opened.of_files, *opened.notices, *overlaps]
    opened.mixture = Mixture([len(source) for source in opened.train], weights)
    _describe(opened, names, held_out, config)
    for setting in OF_SOURCES:
        value, readers = (
            getattr(config, setting),
            [k for k, e in SOURCES.items() if setting in e.settings],
        )
        if value and not kinds & set(readers):
            raise UserError(
                f"data.{setting} is {value!r}: no source here reads it, only {' and '.join(readers)}"
            )
    return opened


def _open_val_source(
    config: DataConfig, names: list[str], kinds: set[str], opened: Opened
) -> Source:
    """The validation data that `data.val_source` names; lines about it are added to those of `opened`."""
    try:
        parts = _open(config.val_source, config, kinds)
    except UserError as error:
        raise UserError(str(error).replace("data.source is", "data.val_source is", 1)) from None
    if config.val_source not in names:
        opened.of_files += parts.notices
    whole = parts.validation is None and parts.test is None
    if whole and config.val_split == "test":
        opened.notices.append(
            f"data.val_split has no effect: {config.val_source} has no parts and is used whole"
        )
    return parts.train if whole else _evaluated(parts, config.val_source, config) or parts.train


def _describe(opened: Opened, names: list[str], held_out: list[Source], config: DataConfig) -> None:
    """Fill in the lines about the sources, and the fingerprint."""
    shares = [share / max(1, opened.mixture.draws) for share in opened.mixture.shares]
    for number, name in enumerate(names):
        train, weight = opened.train[number], opened.weights[number] if opened.weights else None
        parts, mark = [("to train on", train)], train.fingerprint()
        if not config.val_source:
            validation = opened.validation[number]
            held = any(part is validation for part in held_out)
            parts.append(("held out" if held else f"in its {config.val_split} part", validation))
            mark |= {} if held else {"evaluated_on": validation.fingerprint()}
        share = None if weight is None else shares[number]
        opened.summary.append(source_line(name, parts, share))
        opened.fingerprint[name] = mark | ({} if weight is None else {"weight": weight})
        if number in opened.mixture.raised:
            opened.notices.append(
                f"{name}::{weight:g} asks for less than half a picture of the {opened.mixture.draws:,} of an "
                "epoch: it gets one"
            )
    if config.val_source:
        validation = opened.validation[0]
        opened.summary.append(source_line(config.val_source, [("to evaluate on", validation)]))
        opened.fingerprint[names[0]]["evaluated_on"] = validation.fingerprint()


def _evaluated(parts: Parts, name: str, config: DataConfig) -> Source | None:
    """The part that `data.val_split` names; None if some of the training pairs have to be held out instead."""
    if config.val_split == "test" and parts.test is None:
        raise UserError(
            f"data.val_split is 'test', and {name} has no such part: leave it out, or give data.val_source"
        )
    return parts.test if config.val_split == "test" else parts.validation


def open_evaluated(config: DataConfig) -> tuple[list[Source], list[str]]:
    """What training evaluates on, and lines about its files."""
    opened = open_sources(config)
    return opened.validation, opened.of_files


def open_all(config: DataConfig) -> tuple[list[Source], list[str]]:
    """All parts of all sources of `data.source`, for an evaluation on other data, and lines about them."""
    opened = [_open(name, config, set()) for name in weighted(config.source)[0]]
    found = [
        part
        for parts in opened
        for part in (parts.train, parts.validation, parts.test)
        if part is not None
    ]
    # Without duplicates: a source without a training part uses another part for it.
    return list(dict.fromkeys(found)), [line for parts in opened for line in parts.notices]


def _open(name: str, config: DataConfig, kinds: set[str]) -> Parts:
    """Open one source and add its kind to `kinds`."""
    kind, files = sources.recognise(name)
    kinds.add(kind)
    return load(SOURCES[kind])(name, files, config)


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
