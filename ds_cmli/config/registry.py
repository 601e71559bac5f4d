"""The tables of what a run can be built from: losses, backbones, sources; and `--plugin`.

A new one is a file of its own and one entry here, or one that a module of `--plugin MODULE` adds.
Nothing heavy is imported to read the tables: an entry names its implementation as "module:name",
and `load` imports it. The command-line options, the check of the names, the help texts and the
memory prediction follow from the entries.
"""

import importlib
import pkgutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal

from ds_cmli.common import JsonObject, UserError, one_line, option


@dataclass(frozen=True)
class LossEntry:
    # A module, made with `LossConfig`, the student and the teacher's width: a `cmli.PairLoss` if it
    # compares pairs, otherwise called as `losses.target_cmli.TargetCMLI`.
    implementation: str
    # The pair scores that the loss compares, "global" or "cmli"; with gradient caching its
    # negatives are those of the whole step. "" if it treats each pair separately, and so can be
    # computed for each micro-batch.
    scores: Literal["", "global", "cmli"] = ""
    # The function of its scores, by which an exported model computes it; "" if it is neither.
    kind: Literal["", "contrastive", "sigmoid"] = ""
    teacher: bool = False  # whether it needs the teacher's features
    several: bool = False  # whether an image may have several positives


PAIRS, TARGETS = "ds_cmli.losses.pairs", "ds_cmli.losses.target_cmli"
LOSSES = {
    "global": LossEntry(f"{PAIRS}:GlobalContrastive", "global", "contrastive"),
    "global_sigmoid": LossEntry(f"{PAIRS}:GlobalSigmoid", "global", "sigmoid", several=True),
    "cmli": LossEntry(f"{PAIRS}:AllPairsCMLI", "cmli", "contrastive"),
    "cmli_sigmoid": LossEntry(f"{PAIRS}:CMLISigmoid", "cmli", "sigmoid", several=True),
    "target_cmli": LossEntry(f"{TARGETS}:TargetCMLI", teacher=True),
    "cls_kd": LossEntry(f"{TARGETS}:ClsDistillation", teacher=True),
}


@dataclass(frozen=True)
class BackboneEntry:
    implementation: str  # built and used as those of `models/encoders.py`
    models: str  # the models that it supports, for the help text


ENCODERS = "ds_cmli.models.encoders"
IMAGE = {
    "timm": BackboneEntry(f"{ENCODERS}:ImageEncoder", "any model of timm with feature maps"),
}
TEXT = {
    "transformers": BackboneEntry(
        f"{ENCODERS}:TextEncoder", "transformers' BERT, T5, CLIP, GPT-2 and others"
    ),
}

# The types of other libraries' dual encoders, with which a student can start (`student.source`),
# and the module in `models` that builds them.
DUAL = {"clip": "dual", "siglip": "dual", "siglip2": "dual", "open_clip": "open_clip"}


def of_dual(own: JsonObject) -> ModuleType:
    """The module of `models` that builds a dual encoder, by its `model_type`."""
    return importlib.import_module(f"ds_cmli.models.{DUAL[own['model_type']]}")


@dataclass(frozen=True)
class SourceEntry:
    """A kind of source, recognised by the suffixes of its files, or by what its folder holds."""

    implementation: str  # a function of (files, `DataConfig`) -> `data.sources.Source` by split
    what: str  # a description for error messages
    short: str  # one of a few words
    ends: tuple[str, ...] = ()  # suffixes of its files
    holds: tuple[str, ...] = ()  # patterns of files of which its folder holds at least one


SOURCES = {
    "folder": SourceEntry(
        "ds_cmli.data.sources:open_folder",
        "a folder of images with a metadata.csv or metadata.jsonl (file_name, text), or with "
        "train/ and validation/ of these",
        "a folder with a table",
        holds=("metadata.csv", "metadata.jsonl", "train/metadata.csv", "train/metadata.jsonl"),
    ),
    "saved": SourceEntry(
        "ds_cmli.data.arrow:open_saved",
        "a folder of save_to_disk",
        "a folder of save_to_disk",
        holds=("dataset_dict.json", "state.json"),
    ),
    "tars": SourceEntry(
        "ds_cmli.data.tars:open_tars",
        "WebDataset tars, or a folder of them",
        "tar shards",
        ends=(".tar",),
        holds=("*.tar", "data/*.tar"),
    ),
    "parquet": SourceEntry(
        "ds_cmli.data.arrow:open_parquet",
        "parquet files with image bytes, or a folder of them",
        "parquet",
        ends=(".parquet",),
        holds=("*.parquet", "data/*.parquet"),
    ),
    "table": SourceEntry(
        "ds_cmli.data.sources:open_tables",
        "a .csv, .tsv or .jsonl of paths and captions",
        "a table",
        ends=(".csv", ".tsv", ".jsonl"),
    ),
    "json": SourceEntry(
        "ds_cmli.data.sources:open_json",
        "the .json of COCO's captions or of Karpathy's splits",
        "a JSON of captions",
        ends=(".json",),
    ),
}


def load(entry: LossEntry | BackboneEntry | SourceEntry) -> Any:
    """Import the implementation of an entry and return it."""
    return pkgutil.resolve_name(entry.implementation)


def over_pairs(weights: dict[str, float]) -> dict[str, float]:
    """The losses, with their weights, that compare pairs."""
    return {name: weight for name, weight in weights.items() if LOSSES[name].scores}


def needs_teacher(names: Iterable[str]) -> bool:
    return any(LOSSES[name].teacher for name in names)


def compares_tokens(names: Iterable[str]) -> bool:
    """Whether one of the losses uses the all-pairs op."""
    return any(LOSSES[name].scores == "cmli" for name in names)


def load_plugins(context: object, parameter: object, names: Sequence[str]) -> None:
    for name in names:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise UserError(f"--plugin is {name!r}: {one_line(error)}") from error


plugin_option = option(
    "Plugins",
    "--plugin",
    metavar="MODULE",
    multiple=True,
    is_eager=True,  # before options whose values a plugin may add
    expose_value=False,
    callback=load_plugins,
    help="Import a module that registers losses, backbones or sources (docs/plugins.md). "
    "Repeatable.",
)
