"""The tables of what a run can be built from: losses, backbones, sources; and `--plugin`.

A new one is a file of its own and one entry here, or one that a module of `--plugin MODULE` adds.
An entry names its implementation as "module:name", so that the tables import nothing heavy.
"""

import importlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import click

from ds_cmli.errors import blame


@dataclass(frozen=True)
class LossEntry:
    # A module, made with `LossConfig`, the student and the teacher's width: a `cmli.PairLoss` if it
    # compares pairs, otherwise called as `losses.target_cmli.TargetCMLI`.
    implementation: str
    # The pair scores that the loss compares; "" if it treats each pair separately.
    scores: Literal["", "global", "cmli"] = ""
    sigmoid: bool = False  # a sigmoid for each pair: an image may have several positives
    teacher: bool = False  # whether it needs the teacher's features


PAIRS = "ds_cmli.losses.pairs"
TARGETS = "ds_cmli.losses.target_cmli"
LOSSES = {
    "global": LossEntry(f"{PAIRS}:GlobalContrastive", "global"),
    "global_sigmoid": LossEntry(f"{PAIRS}:GlobalSigmoid", "global", sigmoid=True),
    "cmli": LossEntry(f"{PAIRS}:AllPairsCMLI", "cmli"),
    "cmli_sigmoid": LossEntry(f"{PAIRS}:CMLISigmoid", "cmli", sigmoid=True),
    "target_cmli": LossEntry(f"{TARGETS}:TargetCMLI", teacher=True),
    "cls_kd": LossEntry(f"{TARGETS}:ClsDistillation", teacher=True),
}


# Encoders, built and used as these two.
IMAGE = {"timm": "ds_cmli.models.encoders:ImageEncoder"}
TEXT = {"transformers": "ds_cmli.models.encoders:TextEncoder"}


@dataclass(frozen=True)
class SourceEntry:
    """A kind of source, recognised by the suffixes of its files, or by what its folder holds."""

    implementation: str  # a function of (files, `DataConfig`) -> `data.sources.Source` by split
    title: str  # in a few words, for messages
    suffixes: tuple[str, ...] = ()  # of its files
    patterns: tuple[str, ...] = ()  # of files of which its folder holds at least one


TABLES = ("metadata.csv", "metadata.jsonl")
DATA = "ds_cmli.data.sources"
SOURCES = {
    "folder": SourceEntry(
        f"{DATA}.lists:open_folder",
        "a folder of images with a metadata.csv or metadata.jsonl (file_name, text)",
        patterns=(*TABLES, *(f"train/{name}" for name in TABLES)),
    ),
    "saved": SourceEntry(
        f"{DATA}.arrow:open_saved",
        "a folder of save_to_disk",
        patterns=("dataset_dict.json", "state.json"),
    ),
    "tars": SourceEntry(
        f"{DATA}.tars:open_tars", "WebDataset tars", (".tar",), ("*.tar", "data/*.tar")
    ),
    "parquet": SourceEntry(
        f"{DATA}.arrow:open_parquet",
        "parquet files with image bytes",
        (".parquet",),
        ("*.parquet", "data/*.parquet"),
    ),
    "table": SourceEntry(
        f"{DATA}.lists:open_tables",
        "a .csv, .tsv or .jsonl of paths and captions",
        (".csv", ".tsv", ".jsonl"),
    ),
    "json": SourceEntry(
        f"{DATA}.lists:open_json", "the .json of COCO's captions or Karpathy's splits", (".json",)
    ),
}


def over_pairs(weights: dict[str, float]) -> dict[str, float]:
    """Return the losses that compare pairs, with their weights."""
    return {name: weight for name, weight in weights.items() if LOSSES[name].scores}


def compares_tokens(names: Iterable[str]) -> bool:
    """Return True if one of the losses uses the all-pairs op."""
    return any(LOSSES[name].scores == "cmli" for name in names)


def score_scales(scales: Mapping[str, float]) -> dict[str, float]:
    """Return 1/temperature of "global" and of "cmli" scores: that of the first loss over them.

    `scales`: 1/temperature of each loss by name, in the run's order.
    """
    scale_of_scores: dict[str, float] = {}
    for name, scale in scales.items():
        if scores := LOSSES[name].scores:
            scale_of_scores.setdefault(scores, scale)
    return scale_of_scores


def load_plugin(name: str) -> None:
    with blame(f"--plugin is {name!r}"):
        importlib.import_module(name)


plugin_option = click.option(
    "--plugin",
    type=load_plugin,
    metavar="MODULE",
    multiple=True,
    is_eager=True,  # before options whose values a plugin may add
    expose_value=False,
    help="Import a module that registers losses, backbones or sources (docs/plugins.md). "
    "Repeatable.",
)
