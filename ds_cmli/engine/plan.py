"""A run's choices on this device before it is built: precision, batch, steps, backend."""

import os
from dataclasses import replace
from typing import Any

import torch

from ds_cmli.cmli.op import why_not_cpu, why_not_triton
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
TRIAL_PATCHES = 256  # of the image on which kernels are tried; more take no larger tiles


def adapt_to_device(ds_config: DeepSpeedConfig) -> DeepSpeedConfig:
    """Return the JSON in a precision in which this device is fast, and print it if it changes.

    Raises `UserError` if DS_ACCELERATOR names another device than that which PyTorch finds.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    accelerator = os.environ.get("DS_ACCELERATOR", device)
    if accelerator != device:
        raise UserError(
            f"DS_ACCELERATOR is {accelerator!r} and PyTorch trains on {device} here: unset it, or "
            "see CUDA_VISIBLE_DEVICES"
        )
    if device == "cuda":
        # GPUs before Ampere emulate bf16 slowly.
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        chosen = ds_config.on(fp16=True, bf16=has_bf16)
    else:
        print_line(cpu_line())
        # CPUs that have fp16 at all run this step two to three times slower in it than in bf16.
        chosen = ds_config.on(fp16=False, bf16=bf16_is_fast())
    if chosen is not ds_config:
        reason = ", where fp16 is slow or missing" if ds_config.precision == "fp16" else ""
        print_line(f"training in {chosen.precision} on this device ({device}){reason}")
    return chosen


def make_plan(
    config: Config, ds_config: DeepSpeedConfig, samples: int | Order
) -> tuple[DeepSpeedConfig, GlobalBatchSampler, int]:
    """Plan a run, and print how its batch is made up.

    Returns the JSON without "auto" values, the order of the training set's samples with the
    position in it, and the number of optimizer steps.

    Raises `UserError` if the batch sizes contradict each other or exceed the data.
    """
    rank = int(os.environ["RANK"])
    num_ranks = int(os.environ["WORLD_SIZE"])
    batch_pairs, micro_batch, accumulation = ds_config.batch(config.optim.micro_batch, num_ranks)
    sampler = GlobalBatchSampler(samples, micro_batch, rank, num_ranks, config.run.seed)
    steps = config.optim.steps
    if steps is None:
        assert config.optim.epochs is not None
        steps = max(1, int(config.optim.epochs * sampler.batches_per_epoch / accumulation))
    final = ds_config.filled(config, num_ranks, steps)
    negatives = batch_pairs if uses_gradient_caching(config, final) else micro_batch * num_ranks
    print_line(
        f"batch: {micro_batch} pairs per rank x {accumulation} accumulation x {num_ranks} ranks = "
        f"{batch_pairs} pairs a step; {steps} steps; negatives from {negatives} pairs"
    )
    return final, sampler, steps


def uses_gradient_caching(config: Config, ds_config: DeepSpeedConfig) -> bool:
    """Return True if losses over pairs take their negatives from several micro-batches."""
    return (
        ds_config["gradient_accumulation_steps"] > 1
        and config.optim.negatives == "global_batch"
        and any(LOSSES[name].scores for name in config.loss.weights)
    )


def resolve_backend(config: Config, ds_config: DeepSpeedConfig, device: torch.device) -> Config:
    """Return the configuration with the all-pairs backend that runs on the devices of all ranks.

    Prints a line if the device's kernels do not run. Raises `UserError` if the configuration names
    kernels that do not run. Collective.
    """
    if not compares_tokens(config.loss.weights) or config.loss.cmli_backend == "torch":
        return config
    if device.type == "cpu":
        reason_here = why_not_cpu()
    else:
        dtype = DTYPES[ds_config.precision]
        sizes = TRIAL_PATCHES, config.data.context_length, config.student.embed_dim
        reason_here = why_not_triton(device, dtype, *sizes)
        torch.cuda.empty_cache()
    reasons = distributed.gather_objects(reason_here)  # collective
    reason = next((reason for reason in reasons if reason is not None), None)
    chosen = choose_backend(config, device.type, reason)
    if reason is not None:
        kernels = "the C++ kernels do" if device.type == "cpu" else "Triton does"
        print_line(
            f"{kernels} not run, the all-pairs losses take PyTorch's operators, which are slower: "
            f"{reason}"
        )
    return chosen


def choose_backend(config: Config, device: str, why_not: str | None) -> Config:
    """Return the configuration with an all-pairs backend, for training or its prediction.

    On a CPU "auto" stays: the op chooses between the C++ kernels and PyTorch's operators. `why_not`
    says why the device's kernels do not run; None if they do. Raises `UserError` if the
    configuration names kernels that do not run.
    """
    backend = config.loss.cmli_backend
    if not compares_tokens(config.loss.weights) or backend == "torch":
        return config
    device_backend = "triton" if device == "cuda" else "cpu"
    if backend not in ("auto", device_backend):
        why_not = "there is no GPU" if device == "cpu" else "the losses are computed on a GPU"
    if backend != "auto" and why_not is not None:
        raise UserError(
            f"loss.cmli_backend is {backend!r}, which does not run ({why_not}): give 'auto' or "
            "'torch'"
        )
    if device == "cpu":
        return config
    name: Any = "triton" if why_not is None else "torch"
    return replace(config, loss=replace(config.loss, cmli_backend=name))
