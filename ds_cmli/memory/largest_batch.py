"""The largest micro-batch that fits, by predictions of a few."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from ds_cmli.config.deepspeed_config import DeepSpeedConfig
from ds_cmli.memory.progress import Progress
from ds_cmli.memory.report import Report
from ds_cmli.memory.step_memory import Step, predicted_worst
from ds_cmli.memory_model.gpus import Gpu

MAX_BATCH = 2**16
SECOND_BATCH = 128  # the second that is tried: far enough from 1 for a line through both
MAX_GROWTH = 64  # from one micro-batch to the next that is tried


@dataclass
class LargestBatch:
    micro_batch: int  # the largest micro-batch that fits; 0: none does
    report: Report  # for that micro-batch; for micro-batch 1 if none fits
    tried: dict[int, int]  # micro-batch -> predicted bytes on the device


def find_largest_batch(step: Step, gpu: Gpu, room: int, progress: Progress) -> LargestBatch:
    """Find the largest micro-batch that needs at most `room` bytes on the device by prediction."""
    reports: dict[int, Report] = {}
    tried: dict[int, int] = {}
    rank: int | None = None  # the rank that needs the most, whatever the micro-batch

    def needs(micro_batch: int) -> int:
        nonlocal rank
        fitting = max((n for n, size in tried.items() if size <= room), default=None)
        trial = f"micro-batch {micro_batch}" + (f", {fitting} fits" if fitting else "")
        progress.begin(trial, trials_left(tried, room))
        batch = {"train_batch_size": None, "train_micro_batch_size_per_gpu": micro_batch}
        json = DeepSpeedConfig.of({**step.ds_config, **batch})
        report = predicted_worst(replace(step, ds_config=json), gpu, room, rank)
        rank = report.setting["rank"]
        reports[micro_batch] = report
        tried[micro_batch] = report.totals["device"]
        return tried[micro_batch]

    micro_batch = largest_that_fits(needs, room)
    progress.end()
    return LargestBatch(micro_batch, reports[max(micro_batch, 1)], dict(sorted(tried.items())))


def largest_that_fits(needs: Callable[[int], int], room: int, max_batch: int = MAX_BATCH) -> int:
    """Return an n of 1 to `max_batch` with needs(n) <= room < needs(n + n // 200 + 1); 0: none.

    `needs` must grow with n. Sizes that differ by less than half a percent are not told apart: the
    allocator's steps are as large.
    """
    sizes = {1: needs(1)}
    if sizes[1] > room:
        return 0
    low = 1  # fits
    high = max_batch + 1  # does not fit, once it is in `sizes`
    guess = SECOND_BATCH
    while high - low > resolution(low):
        guess = max(guess, low + resolution(low))
        guess = min(guess, max(high - resolution(low), low + 1), MAX_GROWTH * low)
        sizes[guess] = needs(guess)
        if sizes[guess] <= room:
            low = guess
        else:
            high = guess
        guess = next_guess(sizes, room, low, high)
    return low


def resolution(n: int) -> int:
    return n // 200 + 1


def next_guess(sizes: Mapping[int, int], room: int, low: int, high: int) -> int:
    """Return the next n to try, between `low`, which fits, and `high`.

    Sizes are nearly linear in n, so the guess comes from the line through the two that enclose the
    room, or through the two largest. Because they may jump in between, every second n bisects.
    """
    enclosed = high in sizes
    lower, upper = (low, high) if enclosed else sorted(sizes)[-2:]
    bisects = enclosed and len(sizes) % 2 == 0
    if bisects or sizes[lower] == sizes[upper]:
        guess = (low + min(high, MAX_GROWTH * low)) // 2
    else:
        slope_bytes = sizes[upper] - sizes[lower]
        guess = lower + (room - sizes[lower]) * (upper - lower) // slope_bytes
    if not enclosed:
        # The line turns back where the allocator begins to free what it keeps.
        guess = max(guess, low + low // 16)
    return guess


def trials_left(sizes: Mapping[int, int], room: int) -> int:
    """Estimate how many trials are left, given the bytes of those that have ended."""
    low = max((n for n, size in sizes.items() if size <= room), default=0)
    high = min((n for n, size in sizes.items() if size > room), default=None)
    if high is None:
        return max(8 - len(sizes), 3)
    return max(1, math.ceil(math.log2((high - low) / resolution(low))))
