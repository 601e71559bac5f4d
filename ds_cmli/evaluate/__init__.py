"""Evaluation of a trained student, as papers report it.

These are retrieval, zero-shot classification and pointing-game accuracy. The metrics are functions
of tensors, for scores of any model: `ds_cmli.evaluate.recalls(i2t, t2i, image_of)`.

`python -m ds_cmli.evaluate` is the command; the training loop calls `split.evaluate_split`.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ds_cmli.evaluate.metrics import (
        accuracies,
        chance,
        patches_inside,
        phrase_hits,
        recalls,
        scene_hits,
    )

__all__ = ["accuracies", "chance", "patches_inside", "phrase_hits", "recalls", "scene_hits"]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from ds_cmli.evaluate import metrics  # only now: --help of the command needs no torch

    return getattr(metrics, name)
