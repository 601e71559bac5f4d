"""The weights in fp32, whole: out of ZeRO's partitions, and back into them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ds_cmli.distributed import process_group as distributed

if TYPE_CHECKING:
    from ds_cmli.engine import TrainEngine


def collect_weights(engine: TrainEngine) -> dict[str, Tensor]:
    """Return the objective's weights in fp32 on rank 0's host, and {} on the other ranks.

    Trained ones are the optimizer's master weights, at any ZeRO stage: all ranks build one
    parameter at a time, and rank 0 alone keeps it. The others are as their source gave them.
    Persistent buffers (BatchNorm's statistics) are included. Some tensors may share memory with the
    engine's. Collective.
    """
    from deepspeed.utils import safe_get_full_fp32_param

    is_main = distributed.is_main()
    weights = dict(engine.frozen)  # empty on other ranks
    for name, parameter in engine.objective.named_parameters():
        if parameter.requires_grad:
            value = safe_get_full_fp32_param(parameter)  # collective
            if is_main:
                if value is None:
                    value = parameter
                # Under ZeRO-3 a parameter has an empty shape while it is partitioned.
                shape = getattr(parameter, "ds_shape", parameter.shape)
                weights[name] = value.detach().float().cpu().reshape(shape)  # CPU-GPU sync
    if is_main:
        persistent = engine.objective.state_dict().keys()
        for name, buffer in engine.objective.named_buffers():
            if name in persistent:
                value = buffer.float() if buffer.is_floating_point() else buffer
                weights[name] = value.detach().cpu()  # CPU-GPU sync
    return weights


def write_weights(weights: Mapping[str, Tensor], path: Path) -> None:
    """Write a file of safetensors that transformers reads, which takes the format "pt" alone.

    Raises OSError and `SafetensorError`.
    """
    path.touch()
    mode = path.stat().st_mode
    save_file({name: x.contiguous() for name, x in weights.items()}, path, {"format": "pt"})
    path.chmod(mode)  # safetensors makes a file that its owner alone can read


def load_frozen(file: Path, engine: TrainEngine) -> None:
    """Load a checkpoint's weights that are not trained. Collective."""
    from deepspeed.runtime.zero.partition_parameters import GatheredParameters

    with safe_open(file, "pt") as weights, torch.no_grad():
        for name, parameter in engine.objective.named_parameters():
            if parameter.requires_grad:
                continue
            is_partitioned = hasattr(parameter, "ds_status")  # by ZeRO-3
            # Collective: rank 0 gives each rank its part.
            with GatheredParameters([parameter], modifier_rank=0, enabled=is_partitioned):
                if not is_partitioned or distributed.is_main():
                    parameter.copy_(weights.get_tensor(name))
            if name in engine.frozen:
                engine.frozen[name] = weights.get_tensor(name)


def load_averages(file: Path, engine: TrainEngine) -> None:
    """Load a checkpoint's averages; without any they start as the weights."""
    from ds_cmli.engine.ema import set_master_weight

    if engine.ema is None:
        return
    engine.ema.restart()
    if not file.is_file():
        return
    with safe_open(file, "pt") as averages, engine.ema.as_master_weights():
        for name, parameter in engine.objective.named_parameters():
            if parameter.requires_grad:
                set_master_weight(engine.engine, parameter, averages.get_tensor(name))
