"""The order of an epoch's samples: a pure function of the seed, the epoch and the position.

The full order permutes all samples, and holds 4 bytes of each. The windowed order permutes the
shards, and the rows of each shard when its turn comes; it holds numbers of shards alone.

S shards, N samples, L lanes of the windowed order, n positions.
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
ROWS_KEY = "rows"
LANES_KEY = "lanes"

Numbers = np.ndarray  # int64


class Samples(NamedTuple):
    """The samples at n positions of an epoch."""

    indices: Numbers  # [n], over all sources, one after the other
    turns: Numbers  # [n], how often each sample was taken before


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
    by_remainder = sorted(range(len(exact)), key=lambda source: shares[source] - exact[source])
    for source in by_remainder[: max(0, num_draws - sum(shares))]:
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
    ahead = 0  # positions that are announced before they are read

    def __init__(self, lengths: list[int], weights: list[float] | None = None):
        self.lengths = lengths
        self.length = sum(lengths)
        self.shares = lengths if weights is None else split_draws(self.length, weights)
        self.thread = ThreadPoolExecutor(max_workers=1)
        # The epoch that is read, and the next.
        self.begun = lru_cache(2)(lambda *key: self.thread.submit(self._epoch, *key))

    def at(self, positions: Numbers, seed: int, epoch: int) -> Samples:
        """Return the samples at some positions of an epoch."""
        indices, turns = self.begun(seed, epoch).result()
        if positions[-1] >= NEXT_EPOCH_AT * self.length:
            # Some 100 seconds at 1 billion samples: a thread makes it while the run trains.
            self.begun(seed, epoch + 1)
        return Samples(indices[positions], turns[positions])

    def announce(self, positions: Numbers, seed: int, epoch: int) -> None:
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
                taken = permutation(length, seed, source, turn)[start : start + end - position]
                indices.append(taken.numpy().astype(order.dtype) + first)
                turns.append(np.full(len(taken), turn, np.int32))
                position += len(taken)
            first += length
        return Samples(np.concatenate(indices)[order], np.concatenate(turns)[order])


# --- the windowed order


class ShardLanes:
    """Random orders of the N samples of S shards, one for each key.

    The shards are permuted, and the rows of each. This line of N places is cut into L lanes of
    equal length, which are read in turn: position p is place p // L of lane p % L. So L shards are
    read at a time, and a shard may be cut between two lanes. P ranks that take every P-th position
    read L / P shards each, if P divides L.
    """

    def __init__(self, shard_sizes: Numbers, num_lanes: int):
        self.sizes = np.asarray(shard_sizes, np.int64)
        self.num_lanes = num_lanes
        self.starts = np.concatenate([[0], np.cumsum(self.sizes)])  # [S + 1], the first samples
        self.length = int(self.starts[-1])
        self.shard_order = lru_cache(4)(self._shard_order)
        self.row_order = lru_cache(2 * num_lanes)(self._row_order)

    def places(self, positions: Numbers, *key: Hashable) -> tuple[Numbers, Numbers]:
        """Return the shard [n] of each position, and the number of the draw in it [n]."""
        lanes = positions % self.num_lanes
        lane_starts = lanes * (self.length // self.num_lanes)
        lane_starts += np.minimum(lanes, self.length % self.num_lanes)  # the first are one longer
        places = lane_starts + positions // self.num_lanes
        order, ends = self.shard_order(*key)
        numbers = np.searchsorted(ends, places, side="right")
        shards = order[numbers]
        return shards, places - ends[numbers] + self.sizes[shards]

    def samples(self, positions: Numbers, *key: Hashable) -> Numbers:
        """Return the sample [n] at each position."""
        shards, draws = self.places(positions, *key)
        samples = self.starts[shards]
        by_shard = np.argsort(shards, kind="stable")
        borders = np.flatnonzero(np.diff(shards[by_shard])) + 1
        for group in np.split(by_shard, borders):
            shard = int(shards[group[0]])
            rows = self.row_order(shard, *key)
            samples[group] += rows[draws[group]]
        return samples

    def first_samples(self, positions: Numbers, *key: Hashable) -> Numbers:
        """Return the first sample [n] of each position's shard."""
        shards, _ = self.places(positions, *key)
        return self.starts[shards]

    def _shard_order(self, *key: Hashable) -> tuple[Numbers, Numbers]:
        order = permutation(len(self.sizes), *key).numpy().astype(np.int64)
        return order, np.cumsum(self.sizes[order])

    def _row_order(self, shard: int, *key: Hashable) -> np.ndarray:
        return permutation(int(self.sizes[shard]), *key, ROWS_KEY, shard).numpy().copy()


class WindowedOrder:
    """Epochs over several sources in shards, of which `window` are read at a time.

    Without weights an epoch takes every sample once, and all sources' shards are one line. With
    weights it is made of R rows of L draws, one in each lane, and the last draws that are no whole
    row are left out; the shares are numbers of rows. One random pattern of sources is read by every
    lane from another place on, so a batch mixes the sources. Each source has an endless order, as
    in the full order.

    Args:
        shard_sizes: the samples in each shard, of each source.
        window: L, with weights of each source; more than there are samples is as many.
        prefetch: called with the first sample of each shard that `announce` names.
    """

    def __init__(
        self,
        shard_sizes: list[Numbers],
        window: int,
        weights: list[float] | None = None,
        prefetch: Callable[[list[int]], None] | None = None,
    ):
        num_samples = sum(int(np.sum(sizes)) for sizes in shard_sizes)
        num_shards = sum(len(sizes) for sizes in shard_sizes)
        self.window = min(window, num_samples)
        lines = [np.concatenate(shard_sizes)] if weights is None else shard_sizes
        self.lines = [ShardLanes(sizes, self.window) for sizes in lines]
        self.firsts = np.cumsum([0, *(line.length for line in self.lines)])
        self.weights = weights
        self.prefetch = prefetch
        self.length = num_samples
        if weights is not None:
            self.num_rows = num_samples // self.window
            self.length = self.num_rows * self.window
            self.shares = np.array(split_draws(self.num_rows, weights))
            self.pattern = lru_cache(2)(self._pattern)
        # Half a shard of each lane.
        self.ahead = max(1, num_samples // num_shards // 2) * self.window

    def at(self, positions: Numbers, seed: int, epoch: int) -> Samples:
        """Return the samples at some positions of an epoch."""
        return self._find(ShardLanes.samples, positions, seed, epoch)

    def announce(self, positions: Numbers, seed: int, epoch: int) -> None:
        """Call `prefetch` for the shards at the positions; after an epoch's end comes the next."""
        if self.prefetch is None:
            return
        num_later, places = np.divmod(positions, self.length)
        firsts: list[int] = []
        for later in np.unique(num_later).tolist():
            in_epoch = places[num_later == later]
            found = self._find(ShardLanes.first_samples, in_epoch, seed, epoch + later)
            firsts += found.indices.tolist()
        self.prefetch(list(dict.fromkeys(firsts)))  # in the order of their turns, without repeats

    def _find(
        self, find: Callable[..., Numbers], positions: Numbers, seed: int, epoch: int
    ) -> Samples:
        """Return what a method of `ShardLanes` finds at some positions of an epoch."""
        if self.weights is None:
            (line,) = self.lines
            return Samples(find(line, positions, seed, epoch), np.full(len(positions), epoch))
        sources, numbers = self._numbers(positions, seed, epoch)
        indices = np.empty_like(positions)
        turns = numbers // np.diff(self.firsts)[sources]
        for source, turn in set(zip(sources.tolist(), turns.tolist(), strict=True)):
            line = self.lines[source]
            which = (sources == source) & (turns == turn)
            places = numbers[which] - turn * line.length
            indices[which] = self.firsts[source] + find(line, places, seed, source, turn)
        return Samples(indices, turns)

    def _numbers(self, positions: Numbers, seed: int, epoch: int) -> tuple[Numbers, Numbers]:
        """Return the source [n] at each position, and the number [n] in its endless order."""
        pattern, ranks, before = self.pattern(seed, epoch)
        rows, lanes = np.divmod(positions, self.window)
        rows += self._first_rows(lanes)
        rows %= self.num_rows
        sources = pattern[rows]
        shares = self.shares[sources]
        # Every lane takes each source's rows in their order, from the first on.
        source_rows = (ranks[rows] - before[lanes, sources]) % shares + epoch * shares
        return sources, source_rows * self.window + lanes

    def _pattern(self, seed: int, epoch: int) -> tuple[np.ndarray, np.ndarray, Numbers]:
        """Return the source [R] of each row of an epoch, its number [R] among the rows of the same
        source, and how many rows [L, S] of each source come before a lane's first one."""
        sources = np.repeat(np.arange(len(self.shares), dtype=np.int16), self.shares)
        pattern = sources[permutation(self.num_rows, seed, epoch, LANES_KEY).numpy()]
        ranks = np.empty(self.num_rows, np.int32)
        before = np.empty((self.window, len(self.shares)), np.int64)
        first_rows = self._first_rows(np.arange(self.window))
        for source, share in enumerate(self.shares):
            rows = np.flatnonzero(pattern == source)
            ranks[rows] = np.arange(share)
            before[:, source] = np.searchsorted(rows, first_rows)
        return pattern, ranks, before

    def _first_rows(self, lanes: Numbers) -> Numbers:
        return lanes * self.num_rows // self.window


Order = FullOrder | WindowedOrder
