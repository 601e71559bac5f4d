"""The learning rate where the DeepSpeed JSON has no "scheduler": warmup and cosine decay."""

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from ds_cmli.common import JsonObject, Section

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


def with_new_settings(schedule: LRScheduler, fresh: Section, groups: list[JsonObject]) -> None:
    """Give a schedule that was loaded from a checkpoint this start's settings and rates.

    Args:
        fresh: its `state_dict` from before it was loaded.
        groups: the optimizer's.
    """
    vars(schedule).update({name: value for name, value in fresh.items() if name not in POSITION})
    for group, rate in zip(groups, schedule.get_lr(), strict=True):
        group["lr"] = rate
