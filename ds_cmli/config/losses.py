"""The table of losses: all that the other rooms ask about a loss, readable without importing PyTorch.

A new loss is one file in `losses/` and one entry here. `losses.load` imports the class that an entry names.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Entry:
    implementation: str  # "file.Class" in `losses/`, a `losses.base.Loss`
    # The pair scores that the loss compares, "global" or "cmli"; with gradient caching its
    # negatives are those of the whole step. "" if it treats each pair separately, and so can be
    # computed for each micro-batch.
    scores: Literal["", "global", "cmli"] = ""
    # The function of its scores, by which an exported model computes it: "contrastive"
    # (`cmli.contrastive.contrastive_loss`) or "sigmoid" (`losses.functions.sigmoid_loss`). "" if
    # it is neither.
    kind: Literal["", "contrastive", "sigmoid"] = ""
    teacher: bool = False  # whether it needs the teacher's features
    several: bool = False  # whether an image may have several positives
    settings: tuple[str, ...] = ()  # the fields of `LossConfig` that it reads


# The settings of the all-pairs op.
OP = (
    "cmli_backend",
    "cmli_exchange",
    "cmli_gather_bytes",
    "cmli_recompute",
    "cmli_scratch_bytes",
    "cmli_token_keep",
)

LOSSES = {
    "global": Entry(
        "global_contrastive.GlobalContrastive",
        scores="global",
        kind="contrastive",
        settings=("duplicates", "init_temperature"),
    ),
    "global_sigmoid": Entry(
        "global_sigmoid.GlobalSigmoid",
        scores="global",
        kind="sigmoid",
        several=True,
        settings=("duplicates",),
    ),
    "cmli": Entry(
        "cmli.AllPairsCMLI",
        scores="cmli",
        kind="contrastive",
        settings=("duplicates", "cmli_init_temperature", *OP),
    ),
    "cmli_sigmoid": Entry(
        "cmli_sigmoid.CMLISigmoid",
        scores="cmli",
        kind="sigmoid",
        several=True,
        settings=("duplicates", *OP),
    ),
    "target_cmli": Entry(
        "target_cmli.TargetCMLI", teacher=True, settings=("match", "mse_reduction")
    ),
    "cls_kd": Entry("cls_distillation.ClsDistillation", teacher=True, settings=("mse_reduction",)),
}


def over_pairs(weights: dict[str, float]) -> dict[str, float]:
    """The losses, with their weights, that compare pairs."""
    return {name: weight for name, weight in weights.items() if LOSSES[name].scores}


def needs_teacher(names: Iterable[str]) -> bool:
    return any(LOSSES[name].teacher for name in names)


def compares_tokens(names: Iterable[str]) -> bool:
    """Whether one of the losses uses the all-pairs op."""
    return any(LOSSES[name].scores == "cmli" for name in names)
