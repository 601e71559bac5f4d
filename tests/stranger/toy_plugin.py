"""A stranger's plugin: what it registers lies in the other files of this folder."""

from ds_cmli.config.registry import (
    IMAGE,
    LOSSES,
    SOURCES,
    BackboneEntry,
    LossEntry,
    SourceEntry,
)

LOSSES["filip"] = LossEntry("tests.stranger.toy_losses:Filip", scores="cmli", kind="contrastive")
LOSSES["grouping"] = LossEntry("tests.stranger.toy_losses:Grouping")
IMAGE["mixers"] = BackboneEntry("tests.stranger.toy_backbone:Mixers", "a toy")
SOURCES["zip"] = SourceEntry(
    "tests.stranger.toy_source:load_zip", "a zip of pictures", "zip", ends=(".zip",), settings=("separator",)
)
