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


def full_weights(engine: TrainEngine) -> dict[str, Tensor]:
    """The objective's weights in fp32, from the optimizer's master weights, at any ZeRO stage.

    Those that are not trained are on rank 0 alone, as their source gave them. Persistent buffers
    (BatchNorm's statistics) are included. Collective.
    """
    from deepspeed.utils import safe_get_full_fp32_param

    out = dict(engine.frozen)
    for name, parameter in engine.objective.named_parameters():
        if parameter.requires_grad:
            full = safe_get_full_fp32_param(parameter)  # collective; CPU-GPU sync in the copy
            # Under ZeRO-3 a parameter has an empty shape while it is partitioned.
            shape = getattr(parameter, "ds_shape", parameter.shape)
            out[name] = (parameter if full is None else full).detach().float().cpu().reshape(shape)
    kept = engine.objective.state_dict().keys()
    for name, buffer in engine.objective.named_buffers():
        if name in kept:
            value = buffer.float() if buffer.is_floating_point() else buffer
            out[name] = value.detach().cpu().clone()
    return out


def full_averages(engine: TrainEngine) -> dict[str, Tensor] | None:
    """The averages as `full_weights` gives weights; None without EMA. Collective."""
    if engine.ema is None:
        return None
    with engine.ema.as_master_weights():
        full = full_weights(engine)  # collectives
        # Cloned, because on a CPU in fp32 `full_weights` does not copy.
        return {name: value.clone() for name, value in full.items()}


def write_weights(weights: Mapping[str, Tensor], path: Path) -> None:
    """transformers reads only files whose format is "pt"."""
    save_file({name: x.contiguous() for name, x in weights.items()}, path, {"format": "pt"})


def load_frozen(file: Path, engine: TrainEngine) -> None:
    """Load a checkpoint's weights that are not trained. Collective."""
    from deepspeed.runtime.zero.partition_parameters import GatheredParameters

    with safe_open(file, "pt") as weights, torch.no_grad():
        for name, parameter in engine.objective.named_parameters():
            if parameter.requires_grad:
                continue
            divided = hasattr(parameter, "ds_status")
            # Collective: rank 0 gives each rank its part.
            with GatheredParameters([parameter], modifier_rank=0, enabled=divided):
                if not divided or distributed.is_main():
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
