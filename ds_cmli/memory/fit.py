"""The largest micro-batch that fits."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from ds_cmli.config.deepspeed_config import DeepSpeedConfig
from ds_cmli.memory.report import Report
from ds_cmli.memory.step_memory import Step, predicted_worst
from ds_cmli.memory_model.gpus import Gpu

LARGEST_BATCH = 2**16
SECOND_BATCH = 128  # that is tried: far enough from 1 for a line through both
MOST_GROWTH = 64  # from one micro-batch to the next that is tried


@dataclass
class Fit:
    micro_batch: int  # the largest micro-batch that fits; 0: none does
    report: Report  # for that micro-batch; for micro-batch 1 if none fits
    tried: dict[int, int]  # micro-batch -> predicted bytes on the device


def largest(needs: Callable[[int], int], room: int, most: int = LARGEST_BATCH) -> int:
    """An n from 1 to `most` with needs(n) <= room < needs(n + n // 200 + 1); 0 if there is none.

    `needs` must grow with n. It is nearly linear, so the next n to try comes from the line through
    the two that enclose the room, or else the two largest; as it may jump in between, every second
    one halves what is left below one that does not fit. What differs by less than half a percent is
    not told apart: the allocator's steps are as large.
    """
    known = {1: needs(1)}
    if known[1] > room:
        return 0
    low, high, guess = 1, most + 1, SECOND_BATCH
    while high - low > (step := low // 200 + 1):
        guess = min(max(guess, low + step), max(high - step, low + 1), MOST_GROWTH * low)
        known[guess] = needs(guess)
        if known[guess] <= room:
            low = guess
        else:
            high = guess
        a, b = (low, high) if high <= most else sorted(known)[-2:]
        if known[a] == known[b] or (len(known) % 2 == 0 and high <= most):
            guess = (low + min(high, MOST_GROWTH * low)) // 2
        else:
            guess = a + (room - known[a]) * (b - a) // (known[b] - known[a])
        if high > most:  # where the allocator begins to free what it keeps, the line turns back
            guess = max(guess, low + low // 16)
    return low


def fit(step: Step, gpu: Gpu, room: int, tell: Callable[[str], None]) -> Fit:
    """Find the largest micro-batch that needs at most `room` bytes on the device by prediction.

    `tell` is called with lines about the progress.
    """
    reports: dict[int, Report] = {}
    rank: int | None = None  # that needs the most, whatever the micro-batch

    def needs(micro_batch: int) -> int:
        nonlocal rank
        batch = {"train_batch_size": None, "train_micro_batch_size_per_gpu": micro_batch}
        json = DeepSpeedConfig.of({**step.ds_config, **batch})
        report = predicted_worst(replace(step, ds_config=json), gpu, room, rank)
        reports[micro_batch], rank = report, report.setting["rank"]
        tell(f"micro-batch {micro_batch}: {report.totals['device']:,} B on the device")
        return report.totals["device"]

    found = largest(needs, room)
    tried = {n: reports[n].totals["device"] for n in sorted(reports)}
    return Fit(found, reports[max(found, 1)], tried)
