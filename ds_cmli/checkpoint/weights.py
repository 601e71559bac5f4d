"""The student's weights in fp32, without training state: `student.safetensors` in a run's folder.

The averaged weights (`optim.ema_decay`) lie in `student_ema.safetensors`, in the run's folder and
in each checkpoint. A checkpoint's file holds all averages unpartitioned, so that any number of
ranks and any ZeRO stage can resume.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open
from torch import Tensor, nn

from ds_cmli.config.registry import over_pairs
from ds_cmli.config.schema import Config
from ds_cmli.distributed import process_group as distributed
from ds_cmli.models.weights import AVERAGE, WEIGHTS, load_weights

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

    from ds_cmli.data.build import EvalData
    from ds_cmli.data.tokens import CaptionTokenizer
    from ds_cmli.engine import TrainEngine
    from ds_cmli.losses.objective import Objective

FROZEN = "frozen.safetensors"  # a checkpoint's weights that are not trained


def parts(engine: DeepSpeedEngine) -> dict[str, Tensor]:
    """This rank's partition of each parameter, or all of a parameter that is not partitioned."""
    return {name: getattr(p, "ds_tensor", p) for name, p in engine.module.named_parameters()}


def full_weights(module: nn.Module, distilled: bool = False) -> dict[str, Tensor]:
    """Student and temperatures in fp32, from the optimizer's master weights, at any ZeRO stage.

    Persistent buffers (BatchNorm's statistics) are included. `distilled` also includes the head to
    the teacher's width, which belongs to distillation and not to the student. Collective.
    """
    out: dict[str, Tensor] = {}
    for name, parameter in module.named_parameters():
        if distilled or not name.startswith("width_head."):
            out[name] = _full_weight(parameter)  # collective
    kept = module.state_dict().keys()
    for name, buffer in module.named_buffers():
        if name in kept:
            value = buffer.float() if buffer.is_floating_point() else buffer
            out[name] = value.detach().cpu().clone()
    return out


def _full_weight(parameter: nn.Parameter) -> Tensor:
    """One parameter. Collective."""
    from deepspeed.runtime.zero.partition_parameters import GatheredParameters, ZeroParamStatus
    from deepspeed.utils import safe_get_full_fp32_param

    full = safe_get_full_fp32_param(parameter)  # collective; CPU-GPU sync in the copy
    # For a frozen parameter ZeRO-3 has no master weight, and between uses it is partitioned.
    status = getattr(parameter, "ds_status", None)
    divided = full is None and status == ZeroParamStatus.NOT_AVAILABLE
    with GatheredParameters([parameter], enabled=divided):  # collective
        whole = (parameter if full is None else full).detach().float().cpu()
        whole = whole.reshape(full_shape(parameter))
        return whole.clone() if divided else whole.contiguous()


def full_shape(parameter: nn.Parameter) -> torch.Size:
    # Under ZeRO-3 a parameter has an empty shape while it is partitioned.
    return getattr(parameter, "ds_shape", parameter.shape)


def full_averages(train_engine: TrainEngine) -> dict[str, Tensor] | None:
    """The averages as `full_weights` gives weights, with the head to the teacher's width.

    None without EMA. Collective.
    """
    if train_engine.ema is None:
        return None
    objective = train_engine.objective
    with train_engine.ema.as_master_weights():
        full = full_weights(objective, distilled=True)  # collectives
        for name in full:  # cloned, because on a CPU in fp32 `full_weights` does not copy
            full[name] = full[name].clone()
    return full


def frozen(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are not trained, by name."""
    return {name: p for name, p in module.named_parameters() if not p.requires_grad}


def load_frozen(checkpoint: Path, module: nn.Module) -> None:
    """Load a verified checkpoint's frozen weights; older ones have them in DeepSpeed's files.

    Collective.
    """
    from deepspeed.runtime.zero.partition_parameters import GatheredParameters

    path, parameters = checkpoint / FROZEN, frozen(module)
    if not path.is_file():
        return
    with safe_open(path, "pt") as file, torch.no_grad():
        for name, parameter in parameters.items():
            divided = hasattr(parameter, "ds_status")
            # Collective: rank 0 gives each rank its part.
            with GatheredParameters([parameter], modifier_rank=0, enabled=divided):
                if not divided or distributed.is_main():
                    parameter.copy_(file.get_tensor(name))


def load_module(src: Mapping[str, Tensor], dst: nn.Module) -> None:
    """Load DeepSpeed's file of a module, which may lack what is frozen and nothing else.

    DeepSpeed calls it by these names.

    Raises:
        RuntimeError: other names.
    """
    missing, unexpected = dst.load_state_dict(src, strict=False)
    wrong = [*unexpected, *sorted(set(missing) - frozen(dst).keys())]
    if wrong:
        raise RuntimeError(f"only one of the two has {wrong[0]!r}")


def load_averages(checkpoint: Path, train_engine: TrainEngine) -> None:
    """Load a verified checkpoint's averages; without any they start as the weights."""
    from ds_cmli.engine.ema import set_master_weight

    ema, path = train_engine.ema, checkpoint / AVERAGE
    if ema is None:
        return
    ema.restart()
    if not path.is_file():
        return
    with safe_open(path, "pt") as file, ema.as_master_weights():
        for name, parameter in train_engine.objective.named_parameters():
            if parameter.requires_grad:
                set_master_weight(train_engine.engine, parameter, file.get_tensor(name))


def load_student(
    folder: Path,
    config: Config,
    vocabulary: CaptionTokenizer | EvalData,
    name: str = WEIGHTS,
    setting: str = "--checkpoint",
) -> Objective:
    """The student of a run with its losses over pairs, of which a distillation alone has none.

    No teacher is built. Errors as of `load_weights`.
    """
    from ds_cmli.engine import build_models

    pairs = over_pairs(config.loss.weights)
    # A configuration has at least one loss.
    loss = replace(config.loss, weights=pairs or {"global": 1.0}, start={})
    objective, _ = build_models(
        replace(config, loss=loss, optim=replace(config.optim, negatives="micro_batch")),
        vocabulary.vocab_size,
        pretrained=False,
        special=vocabulary.special,
    )
    if not pairs:
        objective.losses.clear()
    load_weights(folder, objective, name, setting)
    return objective
