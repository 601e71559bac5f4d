"""Digests of the local files that a configuration names, which are compared when a run resumes.

Sources of pairs have fingerprints of their own, and the files of "demo" fixed checksums.
"""

import os
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from ds_cmli.common import checksums
from ds_cmli.common.errors import UserError
from ds_cmli.config.open_clip import LOCAL  # timm has the same mark
from ds_cmli.config.registry import needs_teacher
from ds_cmli.config.schema import Config
from ds_cmli.config.settings import flatten
from ds_cmli.config.sources import Source
from ds_cmli.distributed import process_group as distributed
from ds_cmli.distributed.launchers import this_node

NO_PATHS = ("demo", "hub", "random", "builtin", "source", "")
# The files that are read from a folder.
NAMES = {"data.tokenizer": re.compile(r".*\.(json|txt|model)")}
OF_MODEL = re.compile(r"config\.json|.*\.index\.json|.*\.(safetensors|bin|pth?)")


def noted(config: Config) -> dict[str, object]:
    """The digests by setting, which every node reads once. Collective.

    Raises:
        UserError: on every rank, if the nodes have files of other content.
    """
    mine: dict[str, object] = {}
    if os.environ.get("LOCAL_RANK", "0") == "0":
        mine = _digests(config)
    gathered = distributed.gather_objects((this_node(), mine))  # collective
    first, expected = gathered[0]
    for node, digests in gathered:
        for setting, digest in digests.items():
            if digest != expected[setting]:
                raise UserError(
                    f"{setting}: its files on {node} have another content than on {first}: give "
                    "all nodes the same"
                )
    return expected


def _digests(config: Config) -> dict[str, object]:
    digests: dict[str, object] = {}
    for setting, value in _values(config):
        digests[setting] = None
        if value not in NO_PATHS:
            digests[setting] = of_value(value, NAMES.get(setting, OF_MODEL))
    return digests


def _values(config: Config) -> Iterator[tuple[str, str]]:
    """Each setting that may name a file or a folder, and its value."""
    student, teacher = config.student, config.teacher
    yield "data.tokenizer", config.data.tokenizer.removeprefix(LOCAL)
    yield "student.source", Source(student.source).files
    yield "student.image_weights", student.image_weights
    yield "student.text_weights", student.text_weights
    names: dict[str, object] = {"student.image_model": student.image_model}
    names["student.image_overrides"] = student.image_overrides
    if student.text_weights == "hub":
        yield "student.text_model", student.text_model
    if needs_teacher(config.loss.weights):
        yield "teacher.weights", teacher.weights
        names |= {"teacher.model": teacher.model, "teacher.overrides": teacher.overrides}
    for setting, value in flatten(names).items():
        if isinstance(value, str) and value.lower().startswith(LOCAL):
            yield setting, value[len(LOCAL) :]
        elif isinstance(value, str) and not setting.endswith("model"):
            yield setting, value


def of_value(value: str, names: re.Pattern[str] = OF_MODEL) -> object:
    """The digest of the file, or those of the files of a folder, that a setting names."""
    return _digest(Path(os.path.expanduser(value)), names)


def _digest(path: Path, names: re.Pattern[str]) -> object:
    """The digest of a file, or those of the files in a folder by name; None: there is none."""
    if path.is_dir():
        digests = {}
        for file in sorted(path.iterdir()):
            if names.fullmatch(file.name):
                digests[file.name] = _digest(file, names)
        return digests
    with suppress(OSError):  # the library that loads it tells why
        if os.path.isfile(path):  # a FIFO would never end
            return checksums.of_file(path)[:16]
    return None
