"""Questions that take several predictions: a grid of settings, the largest batch that fits."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import product

import numpy as np

from ds_cmli import engine
from ds_cmli.allocator import gpus
from ds_cmli.allocator.allocator import replay
from ds_cmli.config.deepspeed_config import DeepSpeedConfig
from ds_cmli.config.json_values import Section
from ds_cmli.config.schema import Config, check, choice
from ds_cmli.memory.changes import Change, Shortage, Step
from ds_cmli.memory.inputs import candidates, likeliest
from ds_cmli.memory.predict import DEFAULT_GPU, TOTAL_STEPS, Options, Prediction, predict, silent

AXES = ("batch", "world", "stage")
LARGEST_BATCH = 2**16
FIRST_BATCHES = (16, 128)  # micro-batches that are predicted before others are estimated


def parse_axes(texts: tuple[str, ...], micro_batch: int, world_size: int) -> dict[str, list[int]]:
    """`("batch=64,128", "world")` or `("batch=64,128,world",)` -> {"batch": [64, 128], "world": [1,
    2, 8, 64]}.

    An axis without values gets the usual ones. Raises `UserError` for what is neither an axis nor a
    number.
    """
    batches = (micro_batch // 4, micro_batch // 2, micro_batch, 2 * micro_batch)
    usual = {
        "batch": list(filter(None, batches)),
        "world": sorted({1, 2, 8, world_size}),
        "stage": [0, 1, 2, 3],
    }
    axes: dict[str, list[int]] = {}
    for part in map(str.strip, ",".join(texts).split(",")):
        name, equals, value = part.rpartition("=")
        if not equals and not part.isdecimal():
            name, value = part, ""
        if name:
            choice("--sweep", name, AXES)
            axes[name] = []
        if value:
            written = bool(axes) and value.isdecimal()
            check(written, "--sweep", part, "write for instance batch=64,128,world,stage=1,2")
            list(axes.values())[-1].append(int(value))
    for stage in axes.get("stage", []):
        check(stage <= 3, "--sweep stage", stage, "ZeRO's stages are 0 to 3")
    return {name: values or usual[name] for name, values in axes.items()}


def with_batch(ds_config: Section, micro_batch: int) -> DeepSpeedConfig:
    """The DeepSpeed JSON with this micro-batch and its accumulation, without a total batch size."""
    return DeepSpeedConfig.of(ds_config).replaced(
        train_batch_size=None, train_micro_batch_size_per_gpu=micro_batch
    )


def sweep(
    config: Config,
    ds_config: Section,
    world_size: int,
    axes: dict[str, list[int]],
    gpu: str,
    tell: Callable[[str], None],
) -> Iterator[tuple[tuple[int, ...], Prediction]]:
    """Yield (values, prediction) of each point of the grid; the last axis varies fastest."""
    for values in product(*axes.values()):
        point = dict(zip(axes, values, strict=True))
        changed = DeepSpeedConfig.of(ds_config)
        if "batch" in point:
            changed = with_batch(changed, point["batch"])
        if "stage" in point:
            changed = changed.replaced({"stage": point["stage"]})
        ranks = point.get("world", world_size)
        rank = likeliest(changed.stage, ranks)
        options = Options(tell=tell)
        yield values, predict(config, changed, ranks, rank=rank, gpu=gpu, options=options)


def predict_largest(
    config: Config,
    ds_config: Section,
    world_size: int,
    target: str = "cuda",
    gpu: str = DEFAULT_GPU,
    tell: Callable[[str], None] = silent,
) -> Prediction:
    """Predict the rank that needs the most. Arguments as in `predict`."""
    options = Options(tell=tell)
    ranks = candidates(DeepSpeedConfig.of(ds_config).stage, world_size)
    found = (
        predict(config, ds_config, world_size, rank=rank, target=target, gpu=gpu, options=options)
        for rank in ranks
    )
    total = "requested" if target == "cpu" else "device"
    return max(found, key=lambda prediction: prediction.report.totals[total])


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

    `needs` must grow with n.

    `needs` is nearly linear in n, so the next n to try comes from the line through the nearest two
    that were tried. If `needs` is expensive, `estimate` is a cheap approximation of it: the next n
    is then the largest that fits by the estimate, or the one after that.
    """
    low, low_needs = 1, needs(1)
    if low_needs > room:
        return 0
    high, high_needs = most + 1, 0
    if estimate is None:
        high, high_needs = 2, needs(2)
        while high_needs <= room:
            if high == most:
                return most
            guess = high + (room - high_needs) * (high - low) // max(high_needs - low_needs, 1)
            low, low_needs = high, high_needs
            high = min(max(2 * high, min(guess + 1, 64 * high)), most)
            high_needs = needs(high)
    turn = 0
    while high - low > 1:
        # `needs` may jump in between, where neither line nor estimate helps: now and then bisect.
        bisect = turn % 3 == 2
        if estimate is not None:
            bisect = turn > 5 and turn % 2 == 1
        if bisect:
            guess = (low + high) // 2
        elif estimate is not None:
            guess = largest(estimate, room, most)
            guess += guess == low  # `low` is known to fit: try the next one
        else:
            guess = low + (room - low_needs) * (high - low) // (high_needs - low_needs)
            guess += turn % 3
        guess = min(max(guess, low + 1), high - 1)
        turn += 1
        guess_needs = needs(guess)
        if guess_needs <= room:
            low, low_needs = guess, guess_needs
        else:
            high, high_needs = guess, guess_needs
    return low


def estimated_bytes(
    known: dict[int, Prediction], micro_batch: int, gpu: str, world_size: int
) -> int:
    """Estimate the bytes on the device for a micro-batch that was not predicted.

    Each event's bytes follow a polynomial through the nearest three predictions (or fewer) with the
    same number of events; these events are replayed in the allocator's model.
    """
    nearest = sorted(known, key=lambda n: (abs(n - micro_batch), n))
    base = known[nearest[0]].events
    points = [n for n in nearest if len(known[n].events) == len(base)][:3]
    sizes = np.zeros(len(base))
    for n in points:
        weight = np.prod([(micro_batch - other) / (n - other) for other in points if other != n])
        each = np.fromiter((abs(event.bytes) for event in known[n].events), dtype=np.float64)
        sizes += weight * each
    events = []
    for event, size in zip(base, np.rint(sizes), strict=True):
        events.append(replace(event, bytes=max(int(size), 1) * int(np.sign(event.bytes))))
    return gpus.device_bytes(replay(events).reserved_peak, gpu, world_size)


@dataclass
class Fitting:
    """The predictions that `fit` has made so far; each setting is predicted once."""

    config: Config
    ds_config: DeepSpeedConfig
    world_size: int
    gpu: str
    tell: Callable[[str], None]
    predictions: dict[int, Prediction] = field(default_factory=dict)  # by micro-batch
    sizes: dict[str, int] = field(default_factory=dict)  # of the changes that were tried

    def needs(self, micro_batch: int) -> int:
        if micro_batch not in self.predictions:
            self.predictions[micro_batch] = self._predicted(
                f"micro-batch {micro_batch}", self.config, with_batch(self.ds_config, micro_batch)
            )
        return self.predictions[micro_batch].report.totals["device"]

    def needs_with(self, change: Change) -> int:
        if change.what not in self.sizes:
            found = self._predicted(change.what, change.config, change.ds_config)
            self.sizes[change.what] = found.report.totals["device"]
        return self.sizes[change.what]

    def estimate(self, micro_batch: int) -> int:
        for first in FIRST_BATCHES:
            self.needs(first)
        return estimated_bytes(self.predictions, micro_batch, self.gpu, self.world_size)

    def _predicted(self, what: str, config: Config, ds_config: DeepSpeedConfig) -> Prediction:
        def tell(line: str) -> None:
            self.tell(f"{what}: {line}")

        rank = likeliest(ds_config.stage, self.world_size)
        options = Options(tell=tell)
        prediction = predict(
            config, ds_config, self.world_size, gpu=self.gpu, rank=rank, options=options
        )
        tell(f"{prediction.report.totals['device']:,} B on the device")
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
    fitting = Fitting(config, ds_config, world_size, gpu, tell)
    best = largest(fitting.needs, room, estimate=fitting.estimate)
    asked = 1
    if best:
        asked = ds_config.batch(config.optim.micro_batch, world_size)[1]
    found: list[tuple[Change, int]] = []
    if asked > best and room > gpus.device_bytes(0, gpu, world_size):
        one = engine.filled(config, with_batch(ds_config, asked), world_size, TOTAL_STEPS)
        shortage = Shortage(Step(config, one, world_size, True), room, fitting.needs_with)
        found = shortage.proposals() or shortage.combined()
    return Fit(
        best,
        fitting.predictions[best or 1],
        {n: fitting.needs(n) for n in sorted(fitting.predictions)},
        asked,
        [(change.what, size) for change, size in found],
    )
