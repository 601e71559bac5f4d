"""What a run is on this device, decided before it is built: precision, batch, steps, backend."""

import os
from dataclasses import replace
from typing import Any

import torch

from ds_cmli.cmli.op import why_not_triton
from ds_cmli.commands import print_line
from ds_cmli.config.deepspeed_config import DeepSpeedConfig
from ds_cmli.config.registry import LOSSES, compares_tokens
from ds_cmli.config.schema import Config
from ds_cmli.data.order import Order
from ds_cmli.data.sampler import GlobalBatchSampler
from ds_cmli.distributed import process_group as distributed
from ds_cmli.errors import UserError
from ds_cmli.hardware import bf16_is_fast, cpu_line

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
# Patches of an image for which the kernels are tried: more take no other tiles.
MOST_PATCHES = 256


def on_this_device(ds_config: DeepSpeedConfig) -> DeepSpeedConfig:
    """The JSON as this device can run it: its precision is decided.

    Raises `UserError` if DS_ACCELERATOR names another device than that which PyTorch finds.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    wanted = os.environ.get("DS_ACCELERATOR", device)
    if wanted != device:
        raise UserError(
            f"DS_ACCELERATOR is {wanted!r} and PyTorch trains on {device} here: unset it, or see "
            "CUDA_VISIBLE_DEVICES"
        )
    if device == "cuda":
        # GPUs before Ampere emulate bf16 slowly.
        out = ds_config.on(True, torch.cuda.is_bf16_supported(including_emulation=False))
    else:
        print_line(cpu_line())
        # CPUs that have fp16 at all run this step two to three times slower in it than in bf16.
        out = ds_config.on(False, bf16_is_fast())
    if out is not ds_config:
        why = ", where fp16 is slow or missing" if ds_config.precision == "fp16" else ""
        print_line(f"training in {out.precision} on this device ({device}){why}")
    return out


def make_plan(
    config: Config, ds_config: DeepSpeedConfig, samples: int | Order
) -> tuple[DeepSpeedConfig, GlobalBatchSampler, int]:
    """Plan a run, and print how its batch is made up.

    Returns:
        The JSON without "auto" values, the order of the training set's samples with the position in
        it, and the number of optimizer steps.

    Raises `UserError` if the batch cannot be made up.
    """
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    total, micro_batch, accumulation = ds_config.batch(config.optim.micro_batch, ranks)
    sampler = GlobalBatchSampler(samples, micro_batch, rank, ranks, config.run.seed)
    steps = config.optim.steps
    if steps is None:
        assert config.optim.epochs is not None
        steps = max(1, int(config.optim.epochs * sampler.batches_per_epoch / accumulation))
    final = ds_config.filled(config, ranks, steps)
    negatives = total if compares_all(config, final) else micro_batch * ranks
    print_line(
        f"batch: {micro_batch} pairs per rank x {accumulation} accumulation x {ranks} ranks = "
        f"{total} pairs a step; {steps} steps; negatives from {negatives} pairs"
    )
    return final, sampler, steps


def compares_all(config: Config, ds_config: DeepSpeedConfig) -> bool:
    """Whether losses over pairs take their negatives from several micro-batches, by caching."""
    several = (
        ds_config["gradient_accumulation_steps"] > 1 and config.optim.negatives == "global_batch"
    )
    return several and any(LOSSES[name].scores for name in config.loss.weights)


def with_backend(config: Config, ds_config: DeepSpeedConfig, device: torch.device) -> Config:
    """The configuration with the all-pairs backend that runs on the devices of all ranks.

    On a CPU "auto" stays: it means the kernels of the CPU. Collective.
    """
    if not takes_triton(config) or (device.type != "cuda" and config.loss.cmli_backend == "auto"):
        return config
    reason: str | None = "there is no GPU"
    if device.type == "cuda":
        dtype, M = DTYPES[ds_config.precision], config.data.context_length
        own = why_not_triton(device, dtype, MOST_PATCHES, M, config.student.embed_dim)
        torch.cuda.empty_cache()
        reason = next(filter(None, distributed.gather_objects(own)), None)  # collective
    chosen = choose_backend(config, reason)
    if reason is not None:
        print_line(
            f"Triton does not run, the all-pairs losses take PyTorch's, which are slower: {reason}"
        )
    return chosen


def choose_backend(config: Config, why_not: str | None) -> Config:
    """The configuration with the all-pairs backend of a GPU, for training or its prediction.

    Args:
        why_not: why Triton's kernels do not run there; None if they do.

    Raises:
        UserError: the requested backend does not run.
    """
    if not takes_triton(config):
        return config
    if config.loss.cmli_backend == "triton" and why_not is not None:
        raise UserError(
            f"loss.cmli_backend is 'triton', which does not run ({why_not}): give 'auto' or 'torch'"
        )
    backend: Any = "triton" if why_not is None else "torch"
    return replace(config, loss=replace(config.loss, cmli_backend=backend))


def takes_triton(config: Config) -> bool:
    """Whether a loss uses Triton's kernels where they run."""
    return config.loss.cmli_backend in ("auto", "triton") and compares_tokens(config.loss.weights)
