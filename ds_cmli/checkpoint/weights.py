"""The student's weights alone, in fp32: `student.safetensors` of a run's folder."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from ds_cmli.common.errors import UserError
from ds_cmli.models.weights import not_finite

WEIGHTS = "student.safetensors"


def parts(engine: Any) -> dict[str, torch.Tensor]:
    """What this rank holds of each parameter."""
    return {name: getattr(p, "ds_tensor", p) for name, p in engine.module.named_parameters()}


def full_weights(module: nn.Module, optimizer: Any) -> dict[str, torch.Tensor]:
    """Student and temperatures in fp32, from the optimizer's master copy, whatever the ZeRO stage. Collective.

    Buffers that belong to the weights (statistics of BatchNorm) come with them.
    """
    from deepspeed.utils import safe_get_full_fp32_param

    masters = masters_without_zero(optimizer)
    out = {}
    for name, parameter in module.named_parameters():
        if name.startswith("width_head."):
            continue  # maps to the teacher's width: part of distillation, not of the student
        full = masters.get(id(parameter))
        if full is None:
            full = safe_get_full_fp32_param(parameter)  # collective; CPU-GPU sync in the copy
        out[name] = (
            (parameter if full is None else full).detach().float().cpu().reshape(full_shape(parameter)).contiguous()
        )
    kept = module.state_dict().keys()
    for name, buffer in module.named_buffers():
        if name in kept:
            out[name] = (buffer.float() if buffer.is_floating_point() else buffer).detach().cpu().clone()
    return out


def masters_without_zero(optimizer: Any) -> dict[int, torch.Tensor]:
    """id of a 16-bit parameter -> its fp32 master copy, which DeepSpeed's function knows only under ZeRO."""
    out: dict[int, torch.Tensor] = {}
    if hasattr(optimizer, "fp32_groups"):  # FP16_UnfusedOptimizer
        for group, masters in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
            out |= {id(p): master for p, master in zip(group, masters, strict=True)}
    elif hasattr(optimizer, "fp32_groups_flat"):  # FP16_Optimizer
        for group, flat in zip(optimizer.fp16_groups, optimizer.fp32_groups_flat, strict=True):
            parts = flat.split([p.numel() for p in group])
            out |= {id(p): part for p, part in zip(group, parts, strict=True)}
    return out


def full_shape(parameter: nn.Parameter) -> torch.Size:
    # Under ZeRO-3 a parameter's own shape is empty between uses.
    return getattr(parameter, "ds_shape", parameter.shape)


def load_weights(folder: Path, module: nn.Module, name: str = WEIGHTS) -> None:
    """Fill `module` from the file `name` of `folder`; raises `UserError` where they do not belong together."""
    path = folder / name
    if not path.is_file():
        raise UserError(f"--checkpoint is {str(folder)!r}: no {name} there; give a run's output folder")
    try:
        weights = load_file(path)
        missing, unexpected = module.load_state_dict(weights, strict=False)
        # A tensor that a model has under two names (T5's embeddings) is saved under the first.
        names = {*dict(module.named_parameters()), *dict(module.named_buffers())}
        missing = [key for key in missing if key in names]
    except Exception as error:
        raise UserError(f"--checkpoint {path}: cannot load it: {str(error).splitlines()[-1].strip()}") from None
    key = not_finite(weights)
    if key is not None:
        raise UserError(f"--checkpoint {path}: its {key!r} holds NaN or infinite values; give another run's")
    tensors = module.state_dict()
    given = {tensors[name].data_ptr() for name in weights.keys() & tensors.keys()}
    missing = [name for name in missing if tensors[name].data_ptr() not in given]  # tied weights are there once
    if missing or unexpected:
        raise UserError(
            f"--checkpoint {path}: does not fit the model: {(missing + unexpected)[0]!r} has no counterpart"
        )
