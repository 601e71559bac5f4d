"""Opening the sources that a configuration names, and deciding which parts are trained on and which are held out."""

from dataclasses import dataclass, field
from typing import Any

from ds_cmli.common.errors import UserError
from ds_cmli.config.schema import DataConfig
from ds_cmli.data import sources
from ds_cmli.data.sources.base import Parts, Source, hold_out
from ds_cmli.data.sources.names import weighted

OF_SOURCES = ("image_root", "image_key", "caption_key", "separator")  # settings that only some sources read

FOLLOWING = {"folder", "csv", "json"}  # the kinds whose pictures are files of their own


@dataclass
class Opened:
    train: list[Source] = field(default_factory=list)
    validation: list[Source] = field(default_factory=list)
    weights: list[float] | None = None
    notices: list[str] = field(default_factory=list)
    fingerprint: dict[str, Any] = field(default_factory=dict)


def open_sources(config: DataConfig) -> Opened:
    """Open every source of `data.source` for training, and the validation data.

    Validation uses `data.val_source` if given, else each source's own validation part, else a held-out share of it.

    Raises:
        UserError: an error of a source, or a setting that none of the sources reads.
    """
    names, weights = weighted(config.source)
    opened, kinds = Opened(weights=weights), set[str]()
    for number, name in enumerate(names):
        parts = _open(name, config, kinds)
        train, validation = parts.train, None if config.val_source else _evaluated(parts, name, config)
        for split, part in (("validation", parts.validation), ("test", parts.test)):
            if part is not None and part is not validation and name != config.val_source:
                opened.notices.append(f"the {split} part of {name} is not used")
        if not config.val_source:
            if validation is None:
                train, validation = hold_out(train)
            opened.validation.append(validation)
        opened.train.append(train)
        opened.notices += parts.notices
        opened.fingerprint[name] = train.fingerprint() | ({"weight": weights[number]} if weights else {})
    if config.val_source:
        try:
            parts = _open(config.val_source, config, kinds)
        except UserError as error:
            raise UserError(str(error).replace("data.source is", "data.val_source is", 1)) from None
        whole = parts.validation is None and parts.test is None
        if whole and config.val_source in names:
            opened.notices.append(
                f"{config.val_source} is trained on and evaluated on: its results say nothing of others"
            )
        opened.validation = [parts.train if whole else _evaluated(parts, config.val_source, config) or parts.train]
        if whole and config.val_split == "test":
            opened.notices.append(f"data.val_split has no effect: {config.val_source} has no parts and is used whole")
    if config.follow_symlinks and not kinds & FOLLOWING:
        opened.notices.append(f"data.follow_symlinks has no effect: {' and '.join(sorted(kinds))} holds its pictures")
    for setting in OF_SOURCES:
        value, readers = getattr(config, setting), [k for k, e in sources.SOURCES.items() if setting in e.settings]
        if value and not kinds & set(readers):
            raise UserError(f"data.{setting} is {value!r}: no source here reads it, only {' and '.join(readers)}")
    return opened


def _evaluated(parts: Parts, name: str, config: DataConfig) -> Source | None:
    """The part that `data.val_split` names; None if some of the training pairs have to be held out instead."""
    if config.val_split == "test" and parts.test is None:
        raise UserError(f"data.val_split is 'test', and {name} has no such part: leave it out, or give data.val_source")
    return parts.test if config.val_split == "test" else parts.validation


def open_all(config: DataConfig) -> list[Source]:
    """All parts of all sources of `data.source`, for an evaluation on data that is not trained on."""
    opened = [_open(name, config, set()) for name in weighted(config.source)[0]]
    found = [part for parts in opened for part in (parts.train, parts.validation, parts.test) if part is not None]
    return list(dict.fromkeys(found))  # without duplicates: a source without a training part uses another part for it


def _open(name: str, config: DataConfig, kinds: set[str]) -> Parts:
    """Open one source and add its kind to `kinds`."""
    kind, files = sources.recognise(name)
    kinds.add(kind)
    return sources.load(kind)(name, files, config)
