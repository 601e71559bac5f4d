"""The order of an epoch's samples: a pure function of the seed, the epoch and the position.

The full order permutes all samples, and holds 4 bytes of each. The windowed order permutes the
shards, and the rows of each shard when its turn comes; it holds numbers of shards alone.

S shards, N samples, n positions. The windowed order has L lanes, and with weights R rows and K
sources.
"""

import hashlib
from collections.abc import Callable, Hashable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

NEXT_EPOCH_AT = 0.9  # of an epoch, when the next full order is begun

Int64Array = np.ndarray


class Samples(NamedTuple):
    """The samples at n positions of an epoch."""

    indices: Int64Array  # [n], over all sources, one after the other
    turns: Int64Array  # [n], how often each sample was taken before


def permutation(length: int, *key: Hashable) -> Tensor:
    """Return a random permutation [length] that is a pure function of the arguments.

    It is int32, or int64 from 2**31 on.
    """
    digest = hashlib.sha256(" ".join(map(str, key)).encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    dtype = torch.int32 if length < 2**31 else torch.int64
    return torch.randperm(length, generator=generator, dtype=dtype)


def split_draws(num_draws: int, weights: list[float]) -> list[int]:
    """Split an epoch's draws in the ratio of the weights; each source gets at least one."""
    scaled = [weight / max(weights) for weight in weights]  # their sum is finite
    exact = [weight / sum(scaled) * num_draws for weight in scaled]
    shares = [max(1, int(share)) for share in exact]
    # The largest remainders get what rounding down has left.
    sources = sorted(range(len(exact)), key=lambda source: shares[source] - exact[source])
    for source in sources[: max(0, num_draws - sum(shares))]:
        shares[source] += 1
    # The largest shares give what the smallest were given beyond theirs.
    for _ in range(sum(shares) - num_draws):
        shares[shares.index(max(shares))] -= 1
    return shares


# --- the full order


class FullOrder:
    """Epochs over the samples of several sources of the given lengths, in one permutation.

    Without weights an epoch takes every sample once. With weights, whose ratios matter, it has the
    same length and takes from each source its share, at least one sample. Each source has an
    endless order, one permutation of its samples after the other, in which an epoch continues where
    the epoch before stopped.
    """

    window = 0  # shards that are read at a time; 0: any
    num_ahead = 0  # positions that are announced before they are read

    def __init__(self, lengths: list[int], weights: list[float] | None = None):
        self.lengths = lengths
        self.length = sum(lengths)
        self.shares = lengths if weights is None else split_draws(self.length, weights)
        self.thread = ThreadPoolExecutor(max_workers=1)
        # The epoch that is read, and the next one.
        self.epoch_future = lru_cache(2)(lambda *key: self.thread.submit(self._epoch, *key))

    def samples(self, positions: Int64Array, seed: int, epoch: int) -> Samples:
        """Return the samples at some positions of an epoch."""
        indices, turns = self.epoch_future(seed, epoch).result()
        if positions[-1] >= NEXT_EPOCH_AT * self.length:
            # Some 100 seconds at 1 billion samples: a thread makes it while the run trains.
            self.epoch_future(seed, epoch + 1)
        return Samples(indices[positions], turns[positions])

    def announce(self, positions: Int64Array, seed: int, epoch: int) -> None:
        """Announce nothing: every shard may be read at any time."""

    def _epoch(self, seed: int, epoch: int) -> Samples:
        # Copied out of PyTorch's memory: --profile-memory would count it as the step's.
        order = permutation(self.length, seed, epoch).numpy().copy()
        if self.shares == self.lengths:
            return Samples(order, np.broadcast_to(np.int32(epoch), self.length))
        indices = []
        turns = []
        first = 0
        for source, (length, share) in enumerate(zip(self.lengths, self.shares, strict=True)):
            position = epoch * share
            end = position + share
            while position < end:
                turn, start = divmod(position, length)
                samples = permutation(length, seed, source, turn)[start : start + end - position]
                indices.append(samples.numpy().astype(order.dtype) + first)
                turns.append(np.full(len(samples), turn, np.int32))
                position += len(samples)
            first += length
        return Samples(np.concatenate(indices)[order], np.concatenate(turns)[order])


# --- the windowed order


class ShardLanes:
    """Random orders of the N samples of S shards, one for each key.

    A permutation of the shards, with the rows of each shard permuted, is a line of N places. The
    line is cut into L lanes of equal length; a lane may begin or end inside a shard. Position p of
    the order is place p // L of lane p % L, so L shards are read at a time. P ranks that take every
    P-th position read L / P shards each, if P divides L.
    """

    def __init__(self, shard_sizes: Int64Array, num_lanes: int):
        self.sizes = np.asarray(shard_sizes, np.int64)
        self.num_lanes = num_lanes
        self.starts = np.concatenate([[0], np.cumsum(self.sizes)])  # [S + 1], the first samples
        self.length = int(self.starts[-1])
        self.shard_order = lru_cache(4)(self._shard_order)
        # Of each lane: the shard that is read and the next, and those that are announced.
        self.row_order = lru_cache(4 * num_lanes)(self._row_order)

    def find_shards(self, positions: Int64Array, *key: Hashable) -> tuple[Int64Array, Int64Array]:
        """Return the shard [n] of each position, and how many draws of it come before [n]."""
        lanes = positions % self.num_lanes
        lane_starts = lanes * (self.length // self.num_lanes)
        lane_starts += np.minimum(lanes, self.length % self.num_lanes)  # the first are one longer
        places = lane_starts + positions // self.num_lanes
        order, ends = self.shard_order(*key)
        numbers = np.searchsorted(ends, places, side="right")
        shards = order[numbers]
        return shards, places - ends[numbers] + self.sizes[shards]

    def samples(self, positions: Int64Array, *key: Hashable) -> Int64Array:
        """Return the sample [n] at each position."""
        shards, draws = self.find_shards(positions, *key)
        samples = self.starts[shards]
        grouped = np.argsort(shards, kind="stable")
        borders = np.flatnonzero(np.diff(shards[grouped])) + 1
        for group in np.split(grouped, borders):
            shard = int(shards[group[0]])
            rows = self.row_order(shard, *key)
            samples[group] += rows[draws[group]]
        return samples

    def _shard_order(self, *key: Hashable) -> tuple[Int64Array, Int64Array]:
        order = permutation(len(self.sizes), *key).numpy().astype(np.int64)
        return order, np.cumsum(self.sizes[order])

    def _row_order(self, shard: int, *key: Hashable) -> np.ndarray:
        return permutation(int(self.sizes[shard]), *key, "rows", shard).numpy().copy()


class Pattern(NamedTuple):
    """The sources of an epoch's rows, in a random order."""

    sources: np.ndarray  # int16 [R]
    row_numbers: np.ndarray  # int32 [R], among the rows of the same source
    skipped_rows: Int64Array  # [L, K], how many rows of a source come before a lane's first row


class WindowedOrder:
    """Epochs over several sources in shards, of which `window` are read at a time.

    Without weights an epoch takes every sample once, and all sources' shards are one line.

    With weights an epoch is R rows of L draws, one draw in each lane; draws beyond the last whole
    row are left out. A random pattern says which source each row takes, so the shares are numbers
    of rows. Lane l begins the pattern at row l * R // L, so a batch mixes the sources. Each source
    has an endless order, as in the full order.

    Args:
        shard_sizes: the samples in each shard, of each source.
        window: L; with weights each source has L lanes. At most the number of samples.
        prefetch: called with the samples [n] that `announce` names.
    """

    def __init__(
        self,
        shard_sizes: list[Int64Array],
        window: int,
        weights: list[float] | None = None,
        prefetch: Callable[[Int64Array], None] | None = None,
    ):
        num_samples = sum(int(np.sum(sizes)) for sizes in shard_sizes)
        num_shards = sum(len(sizes) for sizes in shard_sizes)
        self.window = min(window, num_samples)
        lines = [np.concatenate(shard_sizes)] if weights is None else shard_sizes
        self.lanes = [ShardLanes(sizes, self.window) for sizes in lines]
        self.starts = np.cumsum([0, *(lanes.length for lanes in self.lanes)])  # the first samples
        self.weights = weights
        self.prefetch = prefetch
        self.length = num_samples
        if weights is not None:
            self.num_rows = num_samples // self.window
            self.length = self.num_rows * self.window
            self.shares = np.array(split_draws(self.num_rows, weights))
            self.pattern = lru_cache(2)(self._pattern)
        # Half a shard of each lane.
        self.num_ahead = max(1, num_samples // num_shards // 2) * self.window

    def samples(self, positions: Int64Array, seed: int, epoch: int) -> Samples:
        """Return the samples at some positions of an epoch."""
        if self.weights is None:
            (lanes,) = self.lanes
            turns = np.full(len(positions), epoch)
            return Samples(lanes.samples(positions, seed, epoch), turns)
        sources, draws = self._source_draws(positions, seed, epoch)
        turns = draws // np.diff(self.starts)[sources]
        indices = np.empty_like(positions)
        for source, turn in set(zip(sources.tolist(), turns.tolist(), strict=True)):
            lanes = self.lanes[source]
            mask = (sources == source) & (turns == turn)
            samples = lanes.samples(draws[mask] - turn * lanes.length, seed, source, turn)
            indices[mask] = self.starts[source] + samples
        return Samples(indices, turns)

    def announce(self, positions: Int64Array, seed: int, epoch: int) -> None:
        """Call `prefetch` with the samples at positions, which go on in the next epoch."""
        if self.prefetch is None:
            return
        epochs_later, positions = np.divmod(positions, self.length)
        indices = []
        for later in np.unique(epochs_later).tolist():
            samples = self.samples(positions[epochs_later == later], seed, epoch + later)
            indices.append(samples.indices)
        self.prefetch(np.concatenate(indices))

    def _source_draws(
        self, positions: Int64Array, seed: int, epoch: int
    ) -> tuple[Int64Array, Int64Array]:
        """Return the source [n] at each position, and the draw's number in its order [n]."""
        pattern = self.pattern(seed, epoch)
        lane_rows, lanes = np.divmod(positions, self.window)
        rows = (lane_rows + self._first_rows(lanes)) % self.num_rows
        sources = pattern.sources[rows]
        shares = self.shares[sources]
        # A lane's first row of a source is draw 0 of the epoch, wherever the lane begins.
        row_numbers = pattern.row_numbers[rows] - pattern.skipped_rows[lanes, sources]
        source_rows = row_numbers % shares + epoch * shares
        return sources, source_rows * self.window + lanes

    def _pattern(self, seed: int, epoch: int) -> Pattern:
        sorted_sources = np.repeat(np.arange(len(self.shares), dtype=np.int16), self.shares)
        sources = sorted_sources[permutation(self.num_rows, seed, epoch, "lanes").numpy()]
        row_numbers = np.empty(self.num_rows, np.int32)
        skipped_rows = np.empty((self.window, len(self.shares)), np.int64)
        first_rows = self._first_rows(np.arange(self.window))
        for source, share in enumerate(self.shares):
            rows = np.flatnonzero(sources == source)
            row_numbers[rows] = np.arange(share)
            skipped_rows[:, source] = np.searchsorted(rows, first_rows)
        return Pattern(sources, row_numbers, skipped_rows)

    def _first_rows(self, lanes: Int64Array) -> Int64Array:
        return lanes * self.num_rows // self.window


Order = FullOrder | WindowedOrder
