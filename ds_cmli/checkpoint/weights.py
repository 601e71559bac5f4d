"""The student's weights in fp32, without training state: `student.safetensors` in a run's folder."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from ds_cmli.common import tensor_file
from ds_cmli.common.errors import UserError
from ds_cmli.models.weights import not_finite

WEIGHTS = "student.safetensors"
AVERAGE = "student_ema.safetensors"  # the averaged weights, with `optim.ema_decay`


def parts(engine: Any) -> dict[str, torch.Tensor]:
    """This rank's partition of each parameter, or the whole parameter if it is not partitioned, by name."""
    return {name: getattr(p, "ds_tensor", p) for name, p in engine.module.named_parameters()}


def full_weights(
    module: nn.Module, optimizer: Any, distilled: bool = False
) -> dict[str, torch.Tensor]:
    """Student and temperatures in fp32, from the optimizer's master weights, at any ZeRO stage. Collective.

    Persistent buffers (BatchNorm's statistics) are included. `distilled` also includes the head to the teacher's width,
    which belongs to distillation and not to the student.
    """
    from deepspeed.runtime.zero.partition_parameters import GatheredParameters, ZeroParamStatus
    from deepspeed.utils import safe_get_full_fp32_param

    from ds_cmli.engine.master_weights import masters_without_zero

    masters = masters_without_zero(optimizer)
    out = {}
    for name, parameter in module.named_parameters():
        if name.startswith("width_head.") and not distilled:
            continue
        full = masters.get(id(parameter))
        if full is None:
            full = safe_get_full_fp32_param(parameter)  # collective; CPU-GPU sync in the copy
        # For a frozen parameter ZeRO-3 has no master weight, and between uses the parameter is partitioned.
        divided = (
            full is None and getattr(parameter, "ds_status", None) == ZeroParamStatus.NOT_AVAILABLE
        )
        with GatheredParameters([parameter], enabled=divided):  # collective
            whole = (
                (parameter if full is None else full)
                .detach()
                .float()
                .cpu()
                .reshape(full_shape(parameter))
            )
            out[name] = whole.clone() if divided else whole.contiguous()
    kept = module.state_dict().keys()
    for name, buffer in module.named_buffers():
        if name in kept:
            out[name] = (
                (buffer.float() if buffer.is_floating_point() else buffer).detach().cpu().clone()
            )
    return out


def full_shape(parameter: nn.Parameter) -> torch.Size:
    # Under ZeRO-3 a parameter has an empty shape while it is partitioned.
    return getattr(parameter, "ds_shape", parameter.shape)


def load_weights(
    folder: Path, module: nn.Module, name: str = WEIGHTS, setting: str = "--checkpoint"
) -> None:
    """Load the file `name` of `folder` into `module`.

    Raises:
        UserError: it is damaged or does not fit; the line names `setting`.
    """
    path = folder / name
    if not path.is_file():
        if name == AVERAGE and (folder / WEIGHTS).is_file():
            raise UserError(
                f"--ema: {str(folder)!r} has no {name}: the run was made without optim.ema_decay"
            )
        raise UserError(
            f"{setting} is {str(folder)!r}: no {name} there; give a run's output folder"
        )
    try:
        damage = tensor_file.damage(path)
        if damage is not None:
            raise UserError(f"{damage}: it is damaged; give an undamaged copy, or another run's")
        weights = load_file(path)
        missing, unexpected = module.load_state_dict(weights, strict=False)
        # A tensor that a model has under two names (T5's embeddings) is saved only under the first.
        names = {*dict(module.named_parameters()), *dict(module.named_buffers())}
        missing = [key for key in missing if key in names]
    except Exception as error:
        raise UserError(
            f"{setting} {path}: cannot load it: {str(error).splitlines()[-1].strip()}"
        ) from None
    key = not_finite(weights)
    if key is not None:
        raise UserError(
            f"{setting} {path}: its {key!r} holds NaN or infinite values; give another run's"
        )
    tensors = module.state_dict()
    given = {tensors[name].data_ptr() for name in weights.keys() & tensors.keys()}
    missing = [
        name for name in missing if tensors[name].data_ptr() not in given
    ]  # tied weights are saved once
    if missing or unexpected:
        raise UserError(
            f"{setting} {path}: does not fit the model: {(missing + unexpected)[0]!r} has no counterpart"
        )
