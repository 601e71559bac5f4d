"""The averaged weights (`optim.ema_decay`) in a checkpoint and in the run's folder: `student_ema.safetensors`.

A checkpoint's file holds every average whole, in fp32, so that any number of ranks and any ZeRO stage goes on with it.
"""

from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from ds_cmli.checkpoint.weights import AVERAGE, full_weights
from ds_cmli.engine import TrainEngine
from ds_cmli.engine.master_weights import set_master_weight


def full_averages(train_engine: TrainEngine) -> dict[str, Tensor] | None:
    """As `full_weights` gives the weights, and with the head to the teacher's width; None without them. Collective."""
    if train_engine.ema is None:
        return None
    with train_engine.ema.as_master_weights():
        full = full_weights(train_engine.objective, train_engine.engine.optimizer, distilled=True)  # collectives
        for name in full:  # in fp32 on a CPU they are no copies
            full[name] = full[name].clone()
    return full


def load_averages(checkpoint: Path, train_engine: TrainEngine) -> None:
    """Those of a verified checkpoint, or without any there the weights themselves. The weights are already loaded."""
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
