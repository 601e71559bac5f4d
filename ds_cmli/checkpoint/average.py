"""The averaged weights (`optim.ema_decay`) in a checkpoint and in the run's folder: `student_ema.safetensors`.

A checkpoint's file holds all averages unpartitioned in fp32, so that any number of ranks and any ZeRO stage can resume.
"""

from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from ds_cmli.checkpoint.weights import AVERAGE, full_weights
from ds_cmli.engine import TrainEngine
from ds_cmli.engine.master_weights import set_master_weight


def full_averages(train_engine: TrainEngine) -> dict[str, Tensor] | None:
    """The averages in `full_weights`'s form, with the head to the teacher's width; None without EMA. Collective."""
    if train_engine.ema is None:
        return None
    with train_engine.ema.as_master_weights():
        full = full_weights(
            train_engine.objective, train_engine.engine.optimizer, distilled=True
        )  # collectives
        for name in full:  # cloned, because on a CPU in fp32 `full_weights` does not copy
            full[name] = full[name].clone()
    return full


def load_averages(checkpoint: Path, train_engine: TrainEngine) -> None:
    """Load a verified checkpoint's averages. If it has none, they start as the weights, which are loaded already."""
    ema, path = train_engine.ema, checkpoint / AVERAGE
    if ema is None:
        return
    ema.restart()
    if not path.is_file():
        return
    module: Any = train_engine.objective
    with safe_open(path, "pt") as file, ema.as_master_weights():
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                set_master_weight(train_engine.engine, parameter, file.get_tensor(name))
