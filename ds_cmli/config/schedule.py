"""The learning rate: warmup and cosine decay, or what the DeepSpeed JSON's "scheduler" says."""

import math
from collections.abc import Callable

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from ds_cmli.common.json_text import JsonObject, Section
from ds_cmli.config.deepspeed_config import DeepSpeedConfig

# What the state of a schedule says of the position in it; the rest are settings.
POSITION = ("last_epoch", "_step_count", "_last_lr", "last_batch_iteration", "lr_lambdas")


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
    if "scheduler" in ds_config:
        return None
    return lambda optimizer: warmup_then_cosine(optimizer, warmup, total_steps)


def with_new_settings(schedule: LRScheduler, fresh: Section, groups: list[JsonObject]) -> None:
    """Give a schedule that was loaded from a checkpoint this start's settings and rates.

    Args:
        fresh: its `state_dict` from before it was loaded.
        groups: the optimizer's.
    """
    vars(schedule).update({name: value for name, value in fresh.items() if name not in POSITION})
    for group, rate in zip(groups, schedule.get_lr(), strict=True):
        group["lr"] = rate
