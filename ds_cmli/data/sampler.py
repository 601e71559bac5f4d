"""The sampler: an endless order of samples, cut into global micro-batches.

It is the same on any number of ranks, and resumable on any other number. B micro_batch (pairs per
rank), P world_size, G = B*P the global micro-batch.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from ds_cmli.data.order import FullOrder, Order
from ds_cmli.errors import UserError


class Draw(NamedTuple):
    """One request of the sampler to a data set."""

    sample: int
    turn: int = 0  # how often the sample was requested before; without weights the epoch, from 0


class GlobalBatchSampler:
    """A batch sampler that yields lists of B `Draw`s without end, across epochs.

    Global micro-batch k of an epoch is positions k*G to (k+1)*G of the order. Of the full order,
    rank r takes the r-th B positions; of the windowed order every P-th from r on, so that it reads
    few of the shards. P ranks with B samples each and one rank with P*B thus see the same global
    batches. An incomplete last batch is dropped.

    Iteration starts at the position, in samples of the global order, that the trainer has
    *consumed*: only `advance` moves it, a loader's prefetching does not.
    """

    def __init__(
        self, samples: int | Order, micro_batch: int, rank: int, world_size: int, seed: int
    ):
        self.order: Order = FullOrder([samples]) if isinstance(samples, int) else samples
        self.length = self.order.length
        self.seed = seed
        self.epoch = 0
        self.position = 0
        self.global_batch = micro_batch * world_size
        if self.order.window:
            self.offsets = rank + np.arange(micro_batch) * world_size
        else:
            self.offsets = rank * micro_batch + np.arange(micro_batch)
        self.batches_per_epoch = self.length // self.global_batch
        if not self.batches_per_epoch:
            batch = f"{self.global_batch} = {micro_batch} (micro-batch) x {world_size} (ranks)"
            short = f"the training set has {self.length} samples, fewer than one global batch"
            raise UserError(f"{short} of {batch}: lower the micro-batch or add data")

    def __iter__(self) -> Iterator[list[Draw]]:
        epoch = self.epoch
        start = self.position
        batch_starts = np.arange(start, start + self.order.num_ahead, self.global_batch)
        self.order.announce((batch_starts[:, None] + self.offsets).ravel(), self.seed, epoch)
        while True:
            if start + self.global_batch > self.length:
                epoch += 1
                start = 0
            positions = start + self.offsets
            announced = np.concatenate([positions, positions + self.order.num_ahead])
            self.order.announce(announced, self.seed, epoch)
            samples = self.order.samples(positions, self.seed, epoch)
            yield list(map(Draw, samples.indices.tolist(), samples.turns.tolist()))
            start += self.global_batch

    def advance(self) -> None:
        """Record that one micro-batch has been trained on (on every rank)."""
        # After a resume with a larger batch, the rest of the epoch may be less than one batch.
        for samples in (0, self.global_batch):
            self.position += samples
            if self.position + self.global_batch > self.length:
                self.epoch += 1
                self.position = 0

    def state_dict(self) -> dict[str, int]:
        names = ("epoch", "position", "length", "seed")
        return {name: getattr(self, name) for name in names} | {"window": self.order.window}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue from `state`, which may be of other ranks and of another micro-batch size."""
        window = state.get("window", 0)
        if window != self.order.window:
            saved = f"the run to resume has shuffled {window or 'all'} shards together"
            raise UserError(f"{saved}: give --set data.shuffle_window={window}")
        for name, value in (("length", self.length), ("seed", self.seed)):
            if state.get(name) != value:
                saved = f"the run to resume has a training set's {name} of {state.get(name)}"
                raise UserError(f"{saved}, this one {value}: resume with the same data and --seed")
        self.epoch = state["epoch"]
        self.position = state["position"]
