"""What a run leaves to go on from: DeepSpeed's checkpoint with the run's state, and the student's weights alone."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from ds_cmli import distributed
from ds_cmli.errors import UserError
from ds_cmli.step import Step

WEIGHTS = "student.safetensors"


@dataclass
class TrainState:
    """Where a run stands. Its `state_dict` goes into the checkpoint beside the engine's own state."""

    step: int = 0  # optimizer steps done
    sampler: dict[str, Any] | None = None  # `GlobalBatchSampler.state_dict()`

    def state_dict(self) -> dict[str, Any]:
        return asdict(self)


def save(folder: Path, step: Step, state: TrainState) -> None:
    """Write `folder/checkpoint` and `folder/student.safetensors`. Collective."""
    tag = f"step{state.step}"
    step.engine.save_checkpoint(str(folder / "checkpoint"), tag=tag, client_state={"train": state.state_dict()})
    weights = full_weights(step.objective)
    if distributed.is_main():
        save_file(weights, folder / WEIGHTS, metadata={"format": "pt", "step": str(state.step)})


def full_weights(module: nn.Module) -> dict[str, torch.Tensor]:
    """Student and temperatures in fp32, from the optimizer's master copy, whatever the ZeRO stage. Collective."""
    from deepspeed.utils import safe_get_full_fp32_param

    out = {}
    for name, parameter in module.named_parameters():
        if name.startswith("width_head."):
            continue  # maps to the teacher's width: part of distillation, not of the student
        full = safe_get_full_fp32_param(parameter)  # collective; CPU-GPU sync in the copy
        out[name] = (parameter if full is None else full).detach().float().cpu().reshape(_shape(parameter)).contiguous()
    return out


def _shape(parameter: nn.Parameter) -> torch.Size:
    # Under ZeRO-3 a parameter's own shape is empty between uses.
    return getattr(parameter, "ds_shape", parameter.shape)


def load_weights(folder: Path, module: nn.Module) -> None:
    """Fill `module` from `folder/student.safetensors`; raises `UserError` where they do not belong together."""
    path = folder / WEIGHTS
    if not path.is_file():
        raise UserError(f"--checkpoint is {str(folder)!r}: no {WEIGHTS} there; give a run's output folder")
    try:
        missing, unexpected = module.load_state_dict(load_file(path), strict=False)
    except Exception as error:
        raise UserError(f"--checkpoint {path}: cannot load it: {str(error).splitlines()[-1].strip()}") from None
    if missing or unexpected:
        raise UserError(
            f"--checkpoint {path}: does not fit the model: {(missing + unexpected)[0]!r} has no counterpart"
        )
