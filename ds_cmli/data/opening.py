"""Opening the sources that a configuration names.

It decides which parts are trained on and which are held out, and makes the lines that the user is
told of the data before a run.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import chain
from typing import Any

import numpy as np

from ds_cmli.common.errors import UserError, printable
from ds_cmli.config.registry import SOURCES
from ds_cmli.config.schema import DataConfig
from ds_cmli.data.bad import Bad, told
from ds_cmli.data.sampler import Mixture
from ds_cmli.data.sources.base import Parts, Source, SourcePart, hold_out
from ds_cmli.data.sources.find import open_source, weighted


@dataclass
class Opened:
    kinds: set[str] = field(default_factory=set)
    train: list[Source] = field(default_factory=list)
    validation: list[Source] = field(default_factory=list)
    held_out: list[Source] = field(default_factory=list)  # what of `validation` is a held-out share
    mixture: Mixture = field(default_factory=lambda: Mixture([0]))
    summary: list[str] = field(default_factory=list)  # a line for each source
    of_files: list[str] = field(default_factory=list)  # lines about what the files hold
    notices: list[str] = field(default_factory=list)  # those, and lines about what becomes of it
    fingerprint: dict[str, dict[str, object]] = field(default_factory=dict)


def open_sources(config: DataConfig) -> Opened:
    """Open every source of `data.source` for training, and the validation data.

    Validation uses `data.val_source` if given, else each source's own validation part, else a
    held-out share of it. Pictures that are held out of one source are not trained on from another.

    Raises:
        UserError: an error of a source, a part without a picture, or a setting that none reads.
    """
    names, weights = weighted(config.source)
    opened = Opened()
    for name in names:
        _open_part(name, config, opened)
    if config.val_source:
        _open_val_source(config, names, opened)
    read = set[str]().union(*(SOURCES[kind].settings for kind in opened.kinds))
    if config.follow_symlinks and "follow_symlinks" not in read:
        kinds = " and ".join(sorted(opened.kinds))
        opened.notices.append(f"data.follow_symlinks has no effect: {kinds} holds its pictures")
    if config.held_out is not None and not opened.held_out:
        opened.notices.append("data.held_out has no effect: validation has data of its own")
    opened.train, lines = kept_apart(opened.train, opened.held_out)
    for part in (*opened.train, *opened.validation):
        if not len(part):
            raise UserError(f"{part.where} has no picture left: give it some, or leave it out")
    lines += shared_lines(opened.train, opened.validation)
    opened.notices = [*opened.of_files, *opened.notices, *lines]
    opened.mixture = Mixture(list(map(len, opened.train)), weights)
    _describe(opened, names, weights, config)
    refuse_not_read(config, read)
    return opened


def refuse_not_read(config: DataConfig, read: set[str]) -> None:
    """Raise `UserError` for one of `settings_of_some` that the opened sources do not read."""
    for setting in settings_of_some():
        value = getattr(config, setting)
        if value and setting not in read:
            readers = [kind for kind, entry in SOURCES.items() if setting in entry.settings]
            raise UserError(
                f"data.{setting} is {value!r}: no source here reads it, only "
                f"{' and '.join(readers)}"
            )


def settings_of_some() -> list[str]:
    """The settings of `DataConfig` that say where pictures and captions stand in some sources."""
    read = {setting for entry in SOURCES.values() for setting in entry.settings}
    return [f.name for f in fields(DataConfig) if f.name in read - {"follow_symlinks"}]


def evaluation_data(config: DataConfig, name: str) -> DataConfig:
    """A run's configuration to evaluate on the source `name`, which `--data` gives.

    Of a source that the run has held a share out of, that share is evaluated; other data is, as
    `val_source`, evaluated whole or in its validation part. The run's settings of its own data do
    not apply to other data.
    """
    if printable(name) != name:
        raise UserError(f"--data is {name!r}, which is no Unicode: rename it")
    trained_on = list(map(_place, weighted(config.source)[0]))
    if config.val_source or _place(name) not in trained_on:
        if _place(name) not in (*trained_on, _place(config.val_source)):
            empty: dict[str, Any] = dict.fromkeys(settings_of_some(), "")
            config = replace(config, **empty)
        config = replace(config, val_source="" if name == "demo" else name, held_out=None)
    if name == "demo":
        config = replace(config, aspect_patch=0, resize="crop")  # its scenes are square
    return replace(config, source=name)


def _place(name: str) -> str:
    return os.path.realpath(os.path.expanduser(name))


def _open_part(name: str, config: DataConfig, opened: Opened) -> None:
    """Add the parts of one source to those `opened`."""
    kind, parts = open_source(name, config)
    opened.kinds.add(kind)
    train, validation = parts.train, None
    if not config.val_source:
        validation = _evaluated(parts, name, config)
    for split, part in (("validation", parts.validation), ("test", parts.test)):
        if part is not None and part is not validation and name != config.val_source:
            opened.notices.append(f"the {split} part of {name} is not used")
    if not config.val_source:
        if validation is None:
            train, validation = hold_out(train, config.held_out)
            opened.held_out.append(validation)
        opened.validation.append(validation)
    opened.train.append(train)
    opened.of_files += parts.notices


def _open_val_source(config: DataConfig, names: list[str], opened: Opened) -> None:
    """Add the validation data of `data.val_source` to what is `opened`."""
    name = config.val_source
    try:
        kind, parts = open_source(name, config)
    except UserError as error:
        setting = "data.source is" if name == config.source else "data.val_source is"
        raise UserError(str(error).replace("data.source is", setting, 1)) from None
    opened.kinds.add(kind)
    if name not in names:
        opened.of_files += parts.notices
    validation: Source | None = None
    if parts.validation is not None or parts.test is not None:
        validation = _evaluated(parts, name, config)
    elif config.val_split == "test":
        line = f"data.val_split has no effect: {name} has no parts and is used whole"
        opened.notices.append(line)
    used = validation or parts.train
    for split, part in (("training", parts.train), ("validation", parts.validation)):
        if part is not None and part is not used and name not in names:
            opened.of_files.append(f"the {split} part of {name} is not evaluated")
    opened.validation = [used]


def _evaluated(parts: Parts, name: str, config: DataConfig) -> Source | None:
    """The part that `data.val_split` names; None if training pairs have to be held out instead."""
    if config.val_split != "test":
        return parts.validation
    if parts.test is None:
        raise UserError(
            f"data.val_split is 'test', and {name} has no such part: leave it out, or give "
            "data.val_source"
        )
    return parts.test


def _describe(
    opened: Opened, names: list[str], weights: list[float] | None, config: DataConfig
) -> None:
    """Fill in the lines about the sources, and the fingerprint."""
    draws = opened.mixture.draws
    for number, name in enumerate(names):
        train = opened.train[number]
        parts: list[tuple[str, Source]] = [("to train on", train)]
        mark = dict(train.fingerprint())
        if not config.val_source:
            validation = opened.validation[number]
            if validation in opened.held_out:
                parts.append(("held out", validation))
            else:
                parts.append((f"in its {config.val_split} part", validation))
                mark["evaluated_on"] = validation.fingerprint()
        share = None
        if weights is not None:
            mark["weight"] = weights[number]
            share = opened.mixture.shares[number] / max(1, draws)
            if number in opened.mixture.raised:
                opened.notices.append(
                    f"{name}::{weights[number]:g} asks for less than half a picture of the "
                    f"{draws:,} of an epoch: it gets one"
                )
        opened.summary.append(source_line(name, parts, share))
        opened.fingerprint[name] = mark
    if config.val_source:
        validation = opened.validation[0]
        opened.summary.append(source_line(config.val_source, [("to evaluate on", validation)]))
        opened.fingerprint[names[0]]["evaluated_on"] = validation.fingerprint()


def open_validation(config: DataConfig) -> Opened:
    """Open what training evaluates on, without the training data where it is not a share of that.

    Raises `UserError` as `open_sources`.
    """
    if not config.val_source:
        return open_sources(config)
    opened = Opened()
    _open_val_source(config, [], opened)
    if config.source == config.val_source:
        refuse_not_read(config, set(SOURCES[next(iter(opened.kinds))].settings))
    return opened


def open_all(config: DataConfig) -> tuple[list[Source], list[str]]:
    """Open all parts of all sources of `data.source`; also returns lines about their files."""
    opened: dict[Source, None] = {}  # no duplicates: without a training part another stands for it
    notices: list[str] = []
    read: set[str] = set()
    for name in weighted(config.source)[0]:
        kind, parts = open_source(name, config)
        read |= set(SOURCES[kind].settings)
        for part in (parts.train, parts.validation, parts.test):
            if part is not None:
                opened[part] = None
        notices += parts.notices
    refuse_not_read(config, read)
    return list(opened), notices


def kept_apart(train: list[Source], held_out: Sequence[Source]) -> tuple[list[Source], list[str]]:
    """Leave out of the training parts what was held out; also a line for each that loses some."""
    taken = np.concatenate([np.zeros(0, np.uint64), *(part.identities() for part in held_out)])
    kept, lines = [], []
    for source in train:
        stays = ~np.isin(source.identities(), taken)
        lost = len(source) - int(stays.sum())
        if lost:
            lines.append(
                f"{lost} pictures of {source.where} are held out under another name too: not "
                "trained on"
            )
            source = SourcePart(source, np.flatnonzero(stays).astype(np.uint32), source.bad)
        kept.append(source)
    return kept, lines


def shared_lines(train: Sequence[Source], evaluated: Sequence[Source]) -> list[str]:
    """Lines about pictures in several training parts, and about those also evaluated on."""
    lines = []
    identities = [source.identities() for source in train]
    for number, source in enumerate(train[1:], 1):
        common = np.isin(identities[number], np.concatenate(identities[:number])).sum()
        if common:
            lines.append(
                f"{common} of {len(source)} pictures of {source.where} are in another source too: "
                "an epoch takes them from each, and they are no negatives of themselves"
            )
    trained = np.concatenate(identities)
    for source in evaluated:
        common = np.isin(source.identities(), trained).sum()
        if common:
            lines.append(
                f"{common} of {len(source)} pictures of {source.where} are trained on and "
                "evaluated on: their results say nothing of others"
            )
    return lines


def source_line(name: str, parts: Sequence[tuple[str, Source]], share: float | None = None) -> str:
    """The line about one source.

    Args:
        parts: what a part is for, such as "to train on", and the part.
        share: the share of an epoch's draws that the source has in a weighted mixture.
    """
    held: list[str] = []
    bad: dict[int, list[Bad]] = {}  # by part, as one can be used twice
    for purpose, part in parts:
        counts = part.caption_counts()
        captions = "captions in .json" if counts is None else f"{int(counts.sum()):,} captions"
        held.append(f"{len(part):,} pictures with {captions} {purpose}")
        bad[id(part)] = part.bad
    if share is not None:
        held.append(f"{share:.3g} of an epoch")
    left_out = list(chain.from_iterable(bad.values()))
    if left_out:
        held.append(f"{len(left_out):,} left out, the first: {', '.join(told(left_out))}")
    else:
        held.append("none left out")
    not_read = dict.fromkeys(chain.from_iterable(part.not_read() for _, part in parts))
    if not_read:
        held.append(f"not read: {'; '.join(not_read)}")
    return f"data: {name}: {', '.join(held)}"
