"""The tables of what a run can be built from: losses, backbones, sources.

A new one is a file of its own and one entry here, or one that a plugin adds (`plugins.py`).
Nothing heavy is imported to read the tables: an entry names its implementation as "module:name",
and `load` imports it. The command-line options, the check of the names, the help texts and the
memory prediction follow from the entries.
"""

import pkgutil
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import Any, Literal

from ds_cmli.common.json_text import JsonObject


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
    settings: tuple[str, ...] = ()  # the fields of `LossConfig` that it reads


# Of the losses over pairs.
PAIRS = ("duplicates", "cmli_backend", "cmli_scratch_bytes")

LOSSES = {
    "global": LossEntry(
        "ds_cmli.losses.pairs:GlobalContrastive",
        scores="global",
        kind="contrastive",
        settings=("init_temperature", *PAIRS),
    ),
    "global_sigmoid": LossEntry(
        "ds_cmli.losses.pairs:GlobalSigmoid",
        scores="global",
        kind="sigmoid",
        several=True,
        settings=("init_bias", *PAIRS),
    ),
    "cmli": LossEntry(
        "ds_cmli.losses.pairs:AllPairsCMLI",
        scores="cmli",
        kind="contrastive",
        settings=("cmli_init_temperature", *PAIRS),
    ),
    "cmli_sigmoid": LossEntry(
        "ds_cmli.losses.pairs:CMLISigmoid",
        scores="cmli",
        kind="sigmoid",
        several=True,
        settings=("init_bias", *PAIRS),
    ),
    "target_cmli": LossEntry(
        "ds_cmli.losses.target_cmli:TargetCMLI",
        teacher=True,
        settings=("mse_reduction", "target_image_weight", "target_text_weight"),
    ),
    "cls_kd": LossEntry(
        "ds_cmli.losses.target_cmli:ClsDistillation", teacher=True, settings=("mse_reduction",)
    ),
}


@dataclass(frozen=True)
class BackboneEntry:
    implementation: str  # a `models.backbone.ImageBackbone` or `TextBackbone`
    models: str  # the models that it supports, for the help text


AUTO = "auto"  # selects the first entry of the table whose `takes` accepts the model
IMAGE = {
    "timm_tokens": BackboneEntry(
        "ds_cmli.models.timm_tokens:TimmTokens", "timm's ViT, DeiT, BEiT, EVA, SigLIP"
    ),
    "timm_naflex": BackboneEntry(
        "ds_cmli.models.timm_naflex:TimmNaFlex", "timm's NaFlexViT, for pictures of any aspect"
    ),
    "timm_grid": BackboneEntry(
        "ds_cmli.models.timm_grid:TimmGrid",
        "timm's Swin, ConvNeXt, ResNet and others with a feature map",
    ),
}
TEXT = {
    "encoder": BackboneEntry(
        "ds_cmli.models.transformers_text:Encoder",
        "transformers' BERT, RoBERTa, DeBERTa, ModernBERT, T5",
    ),
    "causal": BackboneEntry(
        "ds_cmli.models.transformers_text:Causal",
        "transformers' CLIP, GPT-2: pooled at the end token",
    ),
}

# The types of other libraries' dual encoders, with which a student can start (`student.source`),
# and the module in `config`, `models` and `export` that knows them: transformers' or open_clip's.
DUAL = {"clip": "dual", "siglip": "dual", "siglip2": "dual", "open_clip": "open_clip"}


def of_dual(folder: str, own: JsonObject) -> ModuleType:
    """The module in a folder that knows a dual encoder, by its `model_type`."""
    return import_module(f"ds_cmli.{folder}.{DUAL[own['model_type']]}")


@dataclass(frozen=True)
class SourceEntry:
    """A kind of source, recognised by the suffixes of its files, or by files in its folder."""

    implementation: str  # a function of (name, files, `DataConfig`) -> `data.sources.base.Parts`
    what: str  # a description for error messages
    short: str = ""  # one of a few words for --help; "": not named there
    ends: tuple[str, ...] = ()  # suffixes of its files
    holds: tuple[str, ...] = ()  # its folder holds at least one of these files
    in_folder: bool = False  # whether a folder may be given instead of all such files in it
    # The kind of the files of the same names, without pictures, that may lie next to its own.
    companion: str = ""
    # The package that reads it, if it does not come with this one, and the extra that installs it.
    package: str = ""
    extra: str = ""
    # The fields of `DataConfig` that only some kinds read, this one among them.
    settings: tuple[str, ...] = ()


SOURCES = {
    "folder": SourceEntry(
        "ds_cmli.data.sources.folder:load_folder",
        "a folder of images with a metadata.jsonl, which has a line like "
        '{"file_name": "1.jpg", "text": "a red bicycle"} for each caption, or a metadata.csv with '
        "these columns, or with such folders train/ and validation/ in it",
        "a folder",
        holds=("metadata.jsonl", "metadata.csv", "train/metadata.jsonl", "train/metadata.csv"),
        settings=("follow_symlinks",),
    ),
    "tars": SourceEntry(
        "ds_cmli.data.sources.tars:load_tars",
        "uncompressed WebDataset tars such as 'shards/{00000..00019}.tar', or a folder of them",
        "tar shards",
        ends=(".tar",),
        in_folder=True,
        companion="parquet",  # img2dataset writes one next to each tar
        settings=("caption_key",),
    ),
    "parquet": SourceEntry(
        "ds_cmli.data.sources.arrow:load_parquet",
        "parquet files with image bytes, or a folder of them",
        "parquet",
        ends=(".parquet",),
        in_folder=True,
        package="datasets",
        extra="parquet",
        settings=("image_key", "caption_key"),
    ),
    "saved": SourceEntry(
        "ds_cmli.data.sources.arrow:load_saved",
        "a folder that save_to_disk of Hugging Face datasets wrote",
        holds=("dataset_dict.json", "state.json"),
        package="datasets",
        extra="parquet",
        settings=("image_key", "caption_key"),
    ),
    "csv": SourceEntry(
        "ds_cmli.data.sources.tables:load_csv",
        "a CSV or TSV of paths and captions",
        "CSV",
        ends=(".csv", ".tsv"),
        settings=("image_root", "image_key", "caption_key", "separator", "follow_symlinks"),
    ),
    "json": SourceEntry(
        "ds_cmli.data.sources.coco:load_json",
        "the JSON of Karpathy's splits or of COCO's caption annotations",
        "JSON",
        ends=(".json",),
        settings=("image_root", "follow_symlinks"),
    ),
}


Entry = LossEntry | BackboneEntry | SourceEntry


def load(entry: Entry) -> Any:
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
