"""The largest batch that fits."""

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import permutations

import numpy as np

from ds_cmli import engine
from ds_cmli.common.json_text import Section
from ds_cmli.config.deepspeed_config import DeepSpeedConfig
from ds_cmli.config.schema import Config
from ds_cmli.fake_cuda.answer import Room, on_device
from ds_cmli.memory.changes import SettingsChange, Shortage, Step
from ds_cmli.memory.largest_rank import predict_largest
from ds_cmli.memory.predict import DEFAULT_GPU, TOTAL_STEPS, Options, Prediction, silent
from ds_cmli.memory_model import gpus

LARGEST_BATCH = 2**16
SECOND_BATCH = 128  # that is tried: far enough from 1 for a line through both
MOST_GROWTH = 64  # from one micro-batch to the next that is tried


def with_batch(ds_config: Section, micro_batch: int) -> DeepSpeedConfig:
    """The DeepSpeed JSON with this micro-batch and its accumulation, without a total batch size."""
    return DeepSpeedConfig.of(ds_config).replaced(
        train_batch_size=None, train_micro_batch_size_per_gpu=micro_batch
    )


@dataclass
class Fit:
    micro_batch: int  # the largest micro-batch that fits; 0: none does
    prediction: Prediction  # for that micro-batch; for micro-batch 1 if none fits
    tried: dict[int, int]  # micro-batch -> predicted bytes on the device
    # The micro-batch that the changes make fit: the configuration's own, or 1 if none fits.
    asked: int
    # If `asked` does not fit: (a setting to change, bytes on the device with it).
    changes: list[tuple[str, int]]


def largest(
    needs: Callable[[int], int],
    room: int,
    most: int = LARGEST_BATCH,
    estimate: Callable[[int], int] | None = None,
) -> int:
    """The largest n from 1 to `most` with needs(n) <= room; 0 if there is none.

    `needs` must grow with n. It is nearly linear, so the next n to try comes from the line or the
    parabola through the nearest that were tried. If `needs` is expensive, `estimate` is a cheap
    approximation of it, also for n that were not tried, once two were.
    """
    known = {1: needs(1)}
    if known[1] > room:
        return 0
    low, high, guess, beside = 1, most + 1, SECOND_BATCH, False
    while high - low > 1:
        guess = min(max(guess, low + 1), high - 1)
        known[guess] = needs(guess)
        if known[guess] <= room:
            low = guess
        else:
            high = guess
        # `needs` may jump in between, where no curve helps: now and then bisect.
        if (beside and estimate is None) or (len(known) > 8 and len(known) % 2):
            guess, beside = (low + high) // 2, False
            continue
        if estimate is not None:
            guess = largest(estimate, room, most)
        else:
            # A line without an end that does not fit, as a parabola may turn back.
            points = sorted(known, key=lambda n: abs(n - guess))[: 3 if high <= most else 2]
            ns = range(low + 1, min(high, MOST_GROWTH * low))
            guess = low + bisect_right(ns, room, key=partial(_curve, known, points))
        beside = not low + 1 < guess < high - 1
    return low


def _curve(known: dict[int, int], points: list[int], n: int) -> int:
    """The polynomial through the points, at n."""
    return round(sum(weight * known[point] for point, weight in _weights(points, n).items()))


def _weights(points: list[int], n: int) -> dict[int, float]:
    """The weights with which values at `points` add up to their polynomial's value at n."""
    weights = dict.fromkeys(points, 1.0)
    for point, other in permutations(points, 2):
        weights[point] *= (n - other) / (point - other)
    return weights


def estimated_bytes(
    known: dict[int, Prediction], micro_batch: int, room: Room, world_size: int
) -> int:
    """Estimate the bytes on the device for a micro-batch from at least two predictions.

    Each event's bytes follow a polynomial through the nearest two or three predictions with the
    same number of events; these events are replayed in the allocator's model. If the nearest has no
    such other, the requested bytes of the nearest two give a line.
    """
    nearest = sorted(known, key=lambda n: (abs(n - micro_batch), n))
    base = known[nearest[0]]
    points = [n for n in nearest if len(known[n].events) == len(base.events)][:3]
    if len(points) < 2:
        requested = {n: known[n].report.totals["requested"] for n in nearest[:2]}
        more = _curve(requested, nearest[:2], micro_batch) - requested[nearest[0]]
        return base.report.totals["device"] + more
    sizes = np.zeros(len(base.events))
    for n, weight in _weights(points, micro_batch).items():
        sizes += weight * np.fromiter((abs(event.bytes) for event in known[n].events), np.float64)
    events = []
    for event, size in zip(base.events, np.rint(sizes), strict=True):
        events.append(replace(event, bytes=max(int(size), 1) * int(np.sign(event.bytes))))
    return on_device(events, room, world_size)[1]


@dataclass
class Fitting:
    """The predictions that `fit` has made so far; each setting is predicted once."""

    config: Config
    ds_config: DeepSpeedConfig
    world_size: int
    room: Room
    tell: Callable[[str], None]
    predictions: dict[int, Prediction] = field(default_factory=dict)  # by micro-batch
    sizes: dict[str, int] = field(default_factory=dict)  # of the changes that were tried
    rank: int | None = None  # of the last prediction: it is likely to need the most again

    def needs(self, micro_batch: int) -> int:
        if micro_batch not in self.predictions:
            self.predictions[micro_batch] = self._predicted(
                f"micro-batch {micro_batch}", self.config, with_batch(self.ds_config, micro_batch)
            )
        return self.predictions[micro_batch].report.totals["device"]

    def estimate(self, micro_batch: int) -> int:
        return estimated_bytes(self.predictions, micro_batch, self.room, self.world_size)

    def needs_with(self, change: SettingsChange) -> int:
        if change.what not in self.sizes:
            prediction = self._predicted(change.what, change.config, change.ds_config)
            self.sizes[change.what] = prediction.report.totals["device"]
        return self.sizes[change.what]

    def _predicted(self, name: str, config: Config, ds_config: DeepSpeedConfig) -> Prediction:
        options = Options(limit=self.room.bytes, tell=lambda line: self.tell(f"{name}: {line}"))
        prediction = predict_largest(
            config, ds_config, self.world_size, gpu=self.room.gpu, first=self.rank, options=options
        )
        self.rank = prediction.report.setting["rank"]
        options.tell(f"{prediction.report.totals['device']:,} B on the device")
        return prediction


def fit(
    config: Config,
    ds_config: Section,
    world_size: int,
    room: int,
    *,
    gpu: str = DEFAULT_GPU,
    tell: Callable[[str], None] = silent,
) -> Fit:
    """Find the largest micro-batch that needs at most `room` bytes on the device by prediction.

    If the configuration's own micro-batch does not fit, changes of settings are tried for it,
    cheapest first, until two make it fit; if no single change does, they are combined, as few as
    are enough. If not even one pair fits, changes are tried for one pair.

    Args:
        gpu: as in `predict`.
        tell: called with lines about the progress.
    """
    ds_config = DeepSpeedConfig.of(ds_config)
    fitting = Fitting(config, ds_config, world_size, Room(gpu, room), tell)
    best = largest(fitting.needs, room, estimate=fitting.estimate)
    wanted = 1
    if best:
        wanted = ds_config.batch(config.optim.micro_batch, world_size)[1]
    changes: list[tuple[SettingsChange, int]] = []
    if wanted > best and room > gpus.device_bytes(0, gpu, world_size):
        one = engine.filled(config, with_batch(ds_config, wanted), world_size, TOTAL_STEPS)
        shortage = Shortage(Step(config, one, world_size, True), room, fitting.needs_with)
        changes = shortage.proposals() or shortage.combined()
    return Fit(
        best,
        fitting.predictions[best or 1],
        {n: fitting.needs(n) for n in sorted(fitting.predictions)},
        wanted,
        [(change.what, size) for change, size in changes],
    )
