"""The sources that a configuration names, opened: what of them is trained on and what is held out."""

from dataclasses import dataclass, field
from typing import Any

from ds_cmli.common.errors import UserError
from ds_cmli.config.schema import DataConfig
from ds_cmli.data import sources
from ds_cmli.data.sources.base import Parts, Source, hold_out
from ds_cmli.data.sources.names import weighted

OF_SOURCES = ("image_root", "image_key", "caption_key", "separator")  # settings that only some sources read


@dataclass
class Opened:
    train: list[Source] = field(default_factory=list)
    validation: list[Source] = field(default_factory=list)
    weights: list[float] | None = None
    notices: list[str] = field(default_factory=list)
    fingerprint: dict[str, Any] = field(default_factory=dict)


def open_sources(config: DataConfig) -> Opened:
    """Every source of `data.source`; validation is `data.val_source`, or else each source's own part or a share of it.

    Raises:
        UserError: what the sources say, or a setting that none of them reads.
    """
    names, weights = weighted(config.source)
    opened, kinds = Opened(weights=weights), set[str]()
    for number, name in enumerate(names):
        parts = _open(name, config, kinds)
        train, validation = parts.train, parts.validation
        if config.val_source:
            if validation is not None:
                opened.notices.append(f"the validation part of {name} is not used: data.val_source is given")
        else:
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
        opened.validation = [parts.validation or parts.train]
    for setting in OF_SOURCES:
        value, readers = getattr(config, setting), [k for k, e in sources.SOURCES.items() if setting in e.settings]
        if value and not kinds & set(readers):
            raise UserError(f"data.{setting} is {value!r}: no source here reads it, only {' and '.join(readers)}")
    return opened


SPLITS = ("val", "test", "all")


def open_split(config: DataConfig, split: str) -> list[Source]:
    """What an evaluation reads of every source of `data.source`.

    Args:
        split: "val" as a training would hold out, "test" where a source has such a part, "all" for all that there is.

    Raises:
        UserError: as `open_sources`, or a source has no test part.
    """
    if split == "val":
        return open_sources(config).validation
    names, _ = weighted(config.source)
    found: list[Source] = []
    for name in names:
        parts = _open(name, config, set())
        if split == "test" and parts.test is None:
            raise UserError(f"--split is 'test': {name} has no such part, give 'val' or 'all'")
        wanted = (parts.test,) if split == "test" else (parts.train, parts.validation, parts.test)
        found += [part for part in wanted if part is not None]
    return found


def _open(name: str, config: DataConfig, kinds: set[str]) -> Parts:
    """Opens one source; adds its kind to `kinds`."""
    kind, files = sources.recognise(name)
    kinds.add(kind)
    return sources.load(kind)(name, files, config)
