"""The registry of losses. A new loss is one file in this folder and one line in the table below.

That line is all that `--losses` and its check, the help text, the logged columns and the memory prediction need. The
table is read without importing PyTorch: an entry only names its class, and `load` imports it.
"""

from dataclasses import dataclass
from typing import Any

from ds_cmli.common import registry


@dataclass(frozen=True)
class Entry:
    implementation: str  # "file.Class", a `losses.base.Loss`
    # The pair scores that the loss compares, "global" or "cmli"; with gradient caching its negatives are those of the
    # whole step. "" if it treats each pair separately, and so can be computed for each micro-batch.
    scores: str = ""
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
        "global",
        settings=("duplicates", "init_temperature"),
    ),
    "global_sigmoid": Entry(
        "global_sigmoid.GlobalSigmoid", "global", several=True, settings=("duplicates",)
    ),
    "cmli": Entry(
        "cmli.AllPairsCMLI", "cmli", settings=("duplicates", "cmli_init_temperature", *OP)
    ),
    "cmli_sigmoid": Entry(
        "cmli_sigmoid.CMLISigmoid", "cmli", several=True, settings=("duplicates", *OP)
    ),
    "target_cmli": Entry(
        "target_cmli.TargetCMLI", teacher=True, settings=("match", "mse_reduction")
    ),
    "cls_kd": Entry("cls_distillation.ClsDistillation", teacher=True, settings=("mse_reduction",)),
}


def load(name: str) -> Any:
    """Import the file of the loss `name` and return its class."""
    return registry.load(__name__, LOSSES[name].implementation)


def over_pairs(weights: dict[str, float]) -> dict[str, float]:
    """The losses, with their weights, that need no teacher: these are the losses that compare pairs."""
    return {name: weight for name, weight in weights.items() if not LOSSES[name].teacher}


def needs_teacher(names: Any) -> bool:
    return any(LOSSES[name].teacher for name in names)


def compares_tokens(names: Any) -> bool:
    """Whether one of the losses uses the all-pairs op."""
    return any(LOSSES[name].scores == "cmli" for name in names)
