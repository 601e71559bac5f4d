"""Learning rate schedules, and a trial of optimizer and schedule before models are built."""

import inspect
import math
from collections.abc import Callable

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from ds_cmli.common.errors import UserError
from ds_cmli.common.json_text import JsonObject, Section
from ds_cmli.config.deepspeed_config import DeepSpeedConfig
from ds_cmli.config.optimizers import SCHEDULERS
from ds_cmli.config.validation import LARGEST

# What the state of a schedule says of the position in it; the rest are settings.
POSITION = (
    "last_epoch",
    "_step_count",
    "_last_lr",
    "last_batch_iteration",
    "T_cur",
    "T_i",
    "lr_lambdas",
)
MOST_TRIED = 10_000  # at most this many steps of a schedule are tried


def warmup_then_cosine(optimizer: Optimizer, warmup: int, total_steps: int) -> LambdaLR:
    """Linear warmup to the full rate at update `warmup`, then cosine decay; never 0."""

    def share(done: int) -> float:
        update = done + 1
        if update <= warmup:
            return update / warmup
        return 0.5 * (1 + math.cos(math.pi * (update - warmup) / (total_steps + 1 - warmup)))

    return LambdaLR(optimizer, share)


def maker(
    ds_config: DeepSpeedConfig, warmup: int, total_steps: int
) -> Callable[[Optimizer], LRScheduler] | None:
    """A function that makes the schedule for an optimizer; None if DeepSpeed makes it."""
    scheduler = ds_config.get("scheduler")
    if scheduler is None:
        return lambda optimizer: warmup_then_cosine(optimizer, warmup, total_steps)
    if SCHEDULERS[scheduler["type"]].deepspeeds:
        return None
    # DeepSpeed would pass its ZeRO optimizer to PyTorch's schedulers, which refuse it.
    kind = getattr(torch.optim.lr_scheduler, scheduler["type"])
    return lambda optimizer: kind(optimizer, **scheduler["params"])


def with_new_settings(schedule: LRScheduler, fresh: Section, groups: list[JsonObject]) -> None:
    """Give a schedule that was loaded from a checkpoint this start's settings and rates.

    Args:
        fresh: its `state_dict` from before it was loaded.
        groups: the optimizer's.
    """
    vars(schedule).update({name: value for name, value in fresh.items() if name not in POSITION})
    # Most of PyTorch's schedules compute a rate from the one before; their closed form is by the
    # position alone.
    rates = getattr(schedule, "_get_closed_form_lr", schedule.get_lr)()
    for group, rate in zip(groups, rates, strict=True):
        group["lr"] = rate


def try_out(ds_config: DeepSpeedConfig, device: torch.device, total_steps: int) -> str | None:
    """Try two updates of the optimizer and the rates of the schedule, on one-element tensors.

    Returns:
        A line, if the first updates' rates are 0, which change nothing, or if all rates are equal.

    Raises:
        UserError: PyTorch or DeepSpeed refuses the parameters, a rate is negative or too large for
            fp32, or the rate falls to 0 before the last step.
    """
    groups = [{"params": [nn.Parameter(torch.ones(1, device=device))]} for _ in range(2)]
    kind, params = _optimizer(ds_config)
    try:
        optimizer = kind(groups, **params)
        for _ in range(2):
            for group in optimizer.param_groups:
                group["params"][0].grad = torch.ones(1, device=device)
            optimizer.step()
    except Exception as error:  # any exception here is caused by these parameters
        raise UserError(
            f"optimizer.params does not suit {ds_config.optimizer_type}: {error}"
        ) from None
    if "scheduler" not in ds_config:
        return None
    name = ds_config["scheduler"]["type"]
    try:
        largest = _rates(ds_config, optimizer, total_steps)
    except Exception as error:
        raise UserError(f"scheduler.params does not suit {name}: {error}") from None
    moving = [step for step, rate in enumerate(largest) if rate]
    # The last rate alone may be the end of a decay.
    if not moving or moving[-1] < len(largest) - 2:
        first = moving[-1] + 2 if moving else 1
        raise UserError(
            f"scheduler.params of {name}: the rate is 0 from step {first} on and no weight "
            f"changes; the run has {total_steps} steps"
        )
    if len(set(largest)) == 1 < len(largest) == total_steps:
        rate = f"{largest[0]:g} at each of the {total_steps} steps"
        return f"scheduler {name} has no effect: the rate is {rate}"
    idle = moving[0]
    steps = "step changes" if idle == 1 else f"{idle} steps change"
    if idle:
        return f"scheduler {name} starts at rate 0: the first {steps} no weight"
    return None


def _rates(ds_config: DeepSpeedConfig, optimizer: Optimizer, total_steps: int) -> list[float]:
    """The largest rate of each of the run's first steps."""
    name, largest = ds_config["scheduler"]["type"], []
    make = maker(ds_config, 1, total_steps)
    if make is None:
        from deepspeed.runtime import lr_schedules

        schedule = getattr(lr_schedules, name)(optimizer, **ds_config["scheduler"]["params"])
    else:
        schedule = make(optimizer)
    for step in range(min(total_steps, MOST_TRIED)):
        rates = [group["lr"] for group in optimizer.param_groups]
        if not all(isinstance(rate, int | float) and 0 <= rate < LARGEST for rate in rates):
            raise ValueError(f"the rate of step {step + 1} is {rates[0]}")
        largest.append(max(rates))
        schedule.step()
    return largest


def _optimizer(ds_config: DeepSpeedConfig) -> tuple[type[Optimizer], JsonObject]:
    """PyTorch's optimizer of that name, or AdamW for DeepSpeed's own, with its parameters."""
    kind, params = ds_config.optimizer_type, ds_config.optimizer_params
    chosen = ds_config.optimizer_entry.chosen and params.pop("torch_adam")
    if chosen and params.pop("adam_w_mode", True):
        kind = "AdamW"
    stand_in = getattr(torch.optim, kind, torch.optim.AdamW)
    takes = inspect.signature(stand_in).parameters
    return stand_in, {key: value for key, value in params.items() if key in takes}
