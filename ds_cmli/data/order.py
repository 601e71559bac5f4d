"""The order of an epoch's samples: a pure function of the seed, the epoch and the position.

The full order permutes all samples, and holds 4 bytes of each. The windowed order permutes the
shards, and the rows of each shard when its turn comes; it holds numbers of shards alone.

S shards, N samples, L lanes of the windowed order, n positions.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

BLOCK_ROWS = 1024  # at least, from which a weighted epoch takes each source's share
NEXT_EPOCH_AT = 0.9  # of an epoch, when the next full order is begun
ROWS_KEY = "rows"
LANES_KEY = "lanes"

Numbers = np.ndarray  # int64
Value = TypeVar("Value")


class Samples(NamedTuple):
    """The samples at n positions of an epoch."""

    indices: Numbers  # [n], over all sources, one after the other
    turns: Numbers  # [n], how often each sample was taken before


class Order(Protocol):
    """An order of the draws of each epoch."""

    length: int  # draws of an epoch
    window: int  # L; 0: the full order
    ahead: int  # positions that are announced before they are read: half a shard of each lane

    def at(self, positions: Numbers, seed: int, epoch: int) -> Samples: ...
    def announce(self, positions: Numbers, seed: int, epoch: int) -> None: ...


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

    window = 0
    ahead = 0

    def __init__(self, lengths: list[int], weights: list[float] | None = None):
        self.lengths = lengths
        self.length = sum(lengths)
        self.shares = lengths if weights is None else split_draws(self.length, weights)
        # At most two: the epoch that is read, and the next.
        self.epochs = OrderedDict[tuple[int, int], Future[Samples]]()
        self.thread = ThreadPoolExecutor(max_workers=1)

    def at(self, positions: Numbers, seed: int, epoch: int) -> Samples:
        """Return the samples at some positions of an epoch."""
        indices, turns = self._begun(seed, epoch).result()
        if positions[-1] >= NEXT_EPOCH_AT * self.length:
            # Some 100 seconds at 1 billion samples: a thread makes it while the run trains.
            self._begun(seed, epoch + 1)
        return Samples(indices[positions], turns[positions])

    def announce(self, positions: Numbers, seed: int, epoch: int) -> None:
        """Announce nothing: every shard may be read at any time."""

    def _begun(self, seed: int, epoch: int) -> Future[Samples]:
        key = seed, epoch
        if key not in self.epochs:
            self.epochs[key] = self.thread.submit(self._epoch, seed, epoch)
            if len(self.epochs) > 2:
                self.epochs.popitem(last=False)
        return self.epochs[key]

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
        self.shard_orders = OrderedDict[Hashable, tuple[Numbers, Numbers]]()
        self.row_orders = OrderedDict[Hashable, np.ndarray]()

    def places(self, positions: Numbers, *key: Hashable) -> tuple[Numbers, Numbers]:
        """Return the shard [n] of each position, and the number of the draw in it [n]."""
        lanes = positions % self.num_lanes
        lane_starts = lanes * (self.length // self.num_lanes)
        lane_starts += np.minimum(lanes, self.length % self.num_lanes)  # the first are one longer
        places = lane_starts + positions // self.num_lanes
        order, ends = cached(self.shard_orders, key, 4, lambda: self._shard_order(*key))
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
            rows = self._row_order(shard, *key)
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
        size = int(self.sizes[shard])
        return cached(
            self.row_orders,
            (shard, *key),
            2 * self.num_lanes,
            lambda: permutation(size, *key, ROWS_KEY, shard).numpy().copy(),
        )


class SourceDraws(NamedTuple):
    """The draws of one source, in one of its turns, among n positions of an epoch."""

    source: int
    turn: int
    which: Numbers  # of the n positions
    positions: Numbers  # theirs in the turn
    key: tuple[int, ...]  # of the turn


class WindowedOrder:
    """Epochs over several sources in shards, of which `window` are read at a time.

    Without weights an epoch takes every sample once, and all sources' shards are one line. With
    weights it is made of rows of L draws, one in each lane, and the last draws that are no whole
    row are left out; the shares are numbers of rows. In each block of rows every lane takes each
    source's share in an order of its own, so a batch mixes the sources. Each source has an endless
    order, as in the full order.

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
        prefetch: Callable[[Numbers], None] | None = None,
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
        self.num_rows = num_samples // self.window
        if weights is not None:
            self.length = self.num_rows * self.window
            self.shares = split_draws(self.num_rows, weights)
            # In so long blocks the largest source never gets less than no row (`_rows_before`).
            block_rows = max(BLOCK_ROWS, len(weights) ** 2)
            num_blocks = max(1, self.num_rows // block_rows)
            self.block_starts = np.arange(num_blocks + 1) * self.num_rows // num_blocks
        self.ahead = max(1, num_samples // num_shards // 2) * self.window
        self.blocks = OrderedDict[Hashable, tuple[np.ndarray, np.ndarray]]()

    def at(self, positions: Numbers, seed: int, epoch: int) -> Samples:
        """Return the samples at some positions of an epoch."""
        indices = np.empty(len(positions), np.int64)
        turns = np.empty(len(positions), np.int64)
        for draws in self._draws(positions, seed, epoch):
            line = self.lines[draws.source]
            samples = line.samples(draws.positions, *draws.key)
            indices[draws.which] = self.firsts[draws.source] + samples
            turns[draws.which] = draws.turn
        return Samples(indices, turns)

    def announce(self, positions: Numbers, seed: int, epoch: int) -> None:
        """Call `prefetch` for the shards at the positions; after an epoch's end comes the next."""
        if self.prefetch is None:
            return
        in_epoch = positions < self.length
        next_positions = (positions[~in_epoch] - self.length) % self.length
        firsts = np.concatenate(
            [
                self._first_samples(positions[in_epoch], seed, epoch),
                self._first_samples(next_positions, seed, epoch + 1),
            ]
        )
        # In the order of their turns, without repeats.
        _, order = np.unique(firsts, return_index=True)
        self.prefetch(firsts[np.sort(order)])

    def _first_samples(self, positions: Numbers, seed: int, epoch: int) -> Numbers:
        samples = np.empty(len(positions), np.int64)
        for draws in self._draws(positions, seed, epoch):
            line = self.lines[draws.source]
            firsts = line.first_samples(draws.positions, *draws.key)
            samples[draws.which] = self.firsts[draws.source] + firsts
        return samples

    def _draws(self, positions: Numbers, seed: int, epoch: int) -> Iterator[SourceDraws]:
        """Yield the draws of each source and turn that occurs at the positions."""
        if self.weights is None:
            yield SourceDraws(0, epoch, np.arange(len(positions)), positions, (seed, epoch))
            return
        sources, numbers = self._numbers(positions, seed, epoch)
        for source in np.unique(sources).tolist():
            turns, places = np.divmod(numbers, self.lines[source].length)
            for turn in np.unique(turns[sources == source]).tolist():
                which = np.flatnonzero((sources == source) & (turns == turn))
                yield SourceDraws(source, turn, which, places[which], (seed, source, turn))

    def _numbers(self, positions: Numbers, seed: int, epoch: int) -> tuple[Numbers, Numbers]:
        """Return the source [n] at each position, and the number [n] in its endless order."""
        rows, lanes = np.divmod(positions, self.window)
        blocks = np.searchsorted(self.block_starts, rows, side="right") - 1
        sources = np.empty_like(positions)
        source_rows = np.empty_like(positions)
        for block in np.unique(blocks).tolist():
            make_block = partial(self._block, seed, epoch, block)
            pattern, numbers = cached(self.blocks, (seed, epoch, block), 2, make_block)
            which = np.flatnonzero(blocks == block)
            rows_in_block = rows[which] - self.block_starts[block]
            sources[which] = pattern[lanes[which], rows_in_block]
            source_rows[which] = numbers[lanes[which], rows_in_block]
        source_rows += epoch * np.array(self.shares)[sources]
        return sources, source_rows * self.window + lanes

    def _block(self, seed: int, epoch: int, block: int) -> tuple[np.ndarray, np.ndarray]:
        """Return sources [L, R] of a block's rows, and their numbers [L, R] among the epoch's rows
        of the same source and lane."""
        start, end = self.block_starts[block : block + 2].tolist()
        rows_before = self._rows_before(start)
        counts = self._rows_before(end) - rows_before
        in_sequence = np.repeat(np.arange(len(counts)), counts)
        orders = [
            permutation(end - start, seed, epoch, LANES_KEY, block, lane).numpy()
            for lane in range(self.window)
        ]
        pattern = in_sequence[np.stack(orders)]
        numbers = np.empty_like(pattern)
        for source, first in enumerate(rows_before):
            of_source = pattern == source
            numbers[of_source] = (first - 1 + np.cumsum(of_source, axis=1))[of_source]
        return pattern, numbers

    def _rows_before(self, row: int) -> Numbers:
        """Return how many of an epoch's first rows each source gets; the largest the rest."""
        counts = np.array([row * share // self.num_rows for share in self.shares])
        counts[self.shares.index(max(self.shares))] += row - counts.sum()
        return counts


def cached(
    cache: OrderedDict[Hashable, Value], key: Hashable, max_kept: int, make: Callable[[], Value]
) -> Value:
    """Return the value of a key, made if it is not there; the least recently used are dropped."""
    if key not in cache:
        cache[key] = make()
        if len(cache) > max_kept:
            cache.popitem(last=False)
    cache.move_to_end(key)
    return cache[key]
