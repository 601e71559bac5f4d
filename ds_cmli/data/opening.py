"""Opening what `--data` names: its files, and the kind of source that they are."""

import difflib
import glob
import math
import os
import re
from contextlib import suppress
from itertools import chain, islice
from pathlib import Path
from pkgutil import resolve_name

from ds_cmli.config.registry import SOURCES
from ds_cmli.config.schema import DataConfig
from ds_cmli.data.sources import Source
from ds_cmli.data.sources.arrow import arrow_parts, import_datasets
from ds_cmli.data.sources.remote import is_url, open_copied, open_remote
from ds_cmli.data.sources.tars import open_tars
from ds_cmli.errors import UserError, blame
from ds_cmli.pretrained import loading

HUB_DATASETS = "hf://datasets/"
MAX_FILES_SEEN = 100_000  # of a folder of no known kind
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
LIST_SUFFIXES = (".csv", ".tsv", ".jsonl", ".json")
Opened = tuple[str, dict[str, Source]]  # kind, sources by part: train, validation, test


def split_weights(sources: str | list[str]) -> tuple[list[str], list[float] | None]:
    """Split names and weights: `["a::0.7", "b::0.3"]` -> `(["a", "b"], [0.7, 0.3])`."""
    names: list[str] = []
    weights: list[float] = []
    for source in [sources] if isinstance(sources, str) else sources:
        name, mark, weight = source.rpartition("::")
        names.append(name if mark else source)
        if mark:
            with blame(f"--data is {source!r}: write WHAT::WEIGHT, as {name}::0.7"):
                weights.append(float(weight))
                if not 0 < weights[-1] < math.inf:
                    raise ValueError("a weight is above 0")
    if len(set(names)) < len(names) or ("demo" in names and len(names) > 1):
        raise UserError(f"--data is {sources}: name each source once, and the demo alone")
    if weights and (len(weights) < len(names) or len(names) == 1):
        raise UserError(f"--data is {sources}: give each of several sources a weight, or none")
    return names, weights or None


def open_source(name: str, config: DataConfig) -> Opened:
    """Open one source: its kind in a few words, and its parts by split."""
    if is_url(name):
        return "tars in a storage", open_remote(name, expand_braces(name), config)
    if name.startswith(HUB_DATASETS):
        return "a data set of the hub", open_hub(name, config)
    if "://" in name:
        example = f"{name.rstrip('/')}/{{00000..00127}}.tar"
        raise UserError(f"data.source is {name!r}: name the tars of a storage, as {example}")
    path = Path(os.path.expanduser(name))
    named_files = [] if path.is_dir() else expand(name)
    for entry in SOURCES.values():
        files = named_files or sorted(chain.from_iterable(map(path.glob, entry.patterns)))
        matching = [file for file in files if file.name.lower().endswith(entry.suffixes)]
        if files and (not named_files or matching == files):
            open_files = resolve_name(entry.implementation)
            if config.cache and open_files is open_tars:
                open_files = open_copied
            return entry.title, open_files(matching or [path], config)
    raise UserError(f"data.source is {name!r}, {_guess(path)}; {_accepted()}")


def open_hub(name: str, config: DataConfig) -> dict[str, Source]:
    """Open hf://datasets/OWNER/NAME[@REVISION]: its tars, or what `datasets` reads of it."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    repo, _, after_at = name.removeprefix(HUB_DATASETS).partition("@")
    revision = after_at or None
    shards: list[Path] = []
    # `datasets` without a network ignores a revision, so each rank asks for one by itself.
    asked_once = "" if revision else name
    with blame(f"{name} cannot be fetched"), loading(hub=True, name=asked_once):
        with suppress(LocalEntryNotFoundError):  # without a network: `datasets` may have a copy
            folder = snapshot_download(
                repo, repo_type="dataset", revision=revision, allow_patterns="*.tar"
            )
            shards = sorted(Path(folder).rglob("*.tar"))
        if not shards:
            return arrow_parts(import_datasets().load_dataset(repo, revision=revision), config)
    return open_tars(shards, config)


def expand_braces(pattern: str) -> list[str]:
    """Return the names that a pattern stands for, in order: `{00..19}` and `{a,b}`."""
    names = [pattern]
    while braces := next(filter(None, (re.search(r"\{([^{}]*)\}", name) for name in names)), None):
        choices = braces[1].split(",")
        if span := re.fullmatch(r"(\d+)\.\.(\d+)", braces[1]):
            numbers = range(int(span[1]), int(span[2]) + 1)
            choices = [str(number).zfill(len(span[1])) for number in numbers]
        names = [name.replace(braces[0], choice, 1) for name in names for choice in choices]
    return names


def expand(pattern: str) -> list[Path]:
    """Return the files that a name stands for, in order: braces, `*`, `?` and `[]`."""
    names = expand_braces(os.path.expanduser(pattern))
    files = [Path(file) for name in names for file in sorted(glob.glob(name)) or [name]]
    if missing := [file for file in files if not file.is_file()]:
        close = difflib.get_close_matches(str(missing[0]), glob.glob(f"{missing[0].parent}/*"), n=1)
        raise UserError(
            f"data.source is {pattern!r}: {len(missing)} of {len(files)} files do not exist, the "
            f"first {missing[0]}{f' (did you mean {close[0]}?)' if close else ''}; {_accepted()}"
        )
    return files


def _accepted() -> str:
    kinds = ", ".join(entry.title for entry in SOURCES.values())
    return f"accepted are 'demo', {HUB_DATASETS}OWNER/NAME, URLs of tars, {kinds}"


def _guess(path: Path) -> str:
    """Say what a folder or file of no known kind seems to be, and what to do about it."""
    if not path.is_dir():
        return "whose files are of no known kind, or of several"
    entries = sorted(path.iterdir())
    if lists := [file for file in entries if file.suffix.lower() in LIST_SUFFIXES]:
        return f"a folder with the list {lists[0].name}: give that, --data {lists[0]}"
    first_files = islice(path.rglob("*"), MAX_FILES_SEEN)
    if any(file.suffix.lower() in IMAGE_SUFFIXES for file in first_files):
        advice = "write a metadata.csv with file_name,text in it; images by class serve --zero-shot"
        return f"a folder of images without captions: {advice}"
    names = ", ".join(entry.name for entry in entries[:3])
    return f"a folder of no known kind: it holds {names or 'nothing'}"
