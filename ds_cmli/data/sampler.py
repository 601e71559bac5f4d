"""The order of the samples: epochs over one or several sources, cut into global micro-batches.

It is a pure function of the seed and the epoch, the same on any number of ranks, and resumable on
any other number. S sources, L draws (samples) per epoch; B micro_batch (pairs per rank), P
world_size, G = B*P the global micro-batch.
"""

import hashlib
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ds_cmli.errors import UserError


def permutation(length: int, *key: int) -> Tensor:
    """A random permutation, int64 [length], that is a pure function of the arguments."""
    digest = hashlib.sha256(" ".join(map(str, key)).encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    return torch.randperm(length, generator=generator)


class Draw(NamedTuple):
    """One request of the sampler to a data set."""

    sample: int
    turn: int = 0  # how often the sample was requested before; without weights the epoch, from 0


class Mixture:
    """Epochs over the samples of S sources of the given lengths, numbered one after the other.

    Without weights an epoch takes every sample once. With weights, whose ratios matter, it has the
    same length and takes from each source its share, at least one sample. Each source has an
    endless order, one permutation of its samples after the other, in which an epoch continues where
    the epoch before stopped.
    """

    def __init__(self, lengths: list[int], weights: list[float] | None = None):
        self.lengths, self.shares, self.draws = lengths, list(lengths), sum(lengths)
        if weights is not None:
            scaled = [weight / max(weights) for weight in weights]  # their sum is finite
            exact = [weight / sum(scaled) * self.draws for weight in scaled]
            self.shares = [max(1, int(share)) for share in exact]
            # The largest remainders get what rounding down has left.
            rest = sorted(range(len(exact)), key=lambda source: self.shares[source] - exact[source])
            for source in rest[: max(0, self.draws - sum(self.shares))]:
                self.shares[source] += 1
            # The largest shares give what the smallest were given beyond theirs.
            for _ in range(sum(self.shares) - self.draws):
                self.shares[self.shares.index(max(self.shares))] -= 1

    def order(self, seed: int, epoch: int) -> tuple[Tensor, Tensor]:
        """The indices of an epoch's samples, int64 [L], and how often each was taken, int32 [L]."""
        order = permutation(self.draws, seed, epoch)
        if self.shares == self.lengths:
            return order, torch.tensor(epoch, dtype=torch.int32).expand(self.draws)
        indices, turns, first = [], [], 0
        for source, (length, share) in enumerate(zip(self.lengths, self.shares, strict=True)):
            position, end = epoch * share, (epoch + 1) * share
            while position < end:
                turn, start = divmod(position, length)
                taken = permutation(length, seed, source, turn)[start : start + end - position]
                indices.append(first + taken)
                turns.append(torch.full((len(taken),), turn, dtype=torch.int32))
                position += len(taken)
            first += length
        return torch.cat(indices)[order], torch.cat(turns)[order]


class GlobalBatchSampler:
    """A batch sampler that yields lists of B `Draw`s without end, across epochs.

    Global micro-batch k of an epoch is order[k*G : (k+1)*G], of which rank r takes the r-th B
    samples. P ranks with B samples each and one rank with P*B thus see the same global batches. An
    incomplete last batch is dropped.

    Iteration starts at the position, in samples of the global order, that the trainer has
    *consumed*: only `advance` moves it, a loader's prefetching does not.
    """

    def __init__(
        self, samples: int | Mixture, micro_batch: int, rank: int, world_size: int, seed: int
    ):
        self.mixture = Mixture([samples]) if isinstance(samples, int) else samples
        self.length, self.seed, self.epoch, self.position = self.mixture.draws, seed, 0, 0
        self.micro_batch, self.rank, self.global_batch = micro_batch, rank, micro_batch * world_size
        self.batches_per_epoch = self.length // self.global_batch
        if not self.batches_per_epoch:
            batch = f"{self.global_batch} = {micro_batch} (micro-batch) x {world_size} (ranks)"
            what = f"the training set has {self.length} samples, fewer than one global batch"
            raise UserError(f"{what} of {batch}: lower the micro-batch or add data")

    def __iter__(self) -> Iterator[list[Draw]]:
        epoch, position = self.epoch, self.position
        while True:
            # Copied out of PyTorch's memory: --profile-memory would count them as the step's.
            indices, turns = (part.numpy().copy() for part in self.mixture.order(self.seed, epoch))
            for start in range(position, self.length - self.global_batch + 1, self.global_batch):
                first = start + self.rank * self.micro_batch
                own = slice(first, first + self.micro_batch)
                yield list(map(Draw, indices[own].tolist(), turns[own].tolist()))
            epoch, position = epoch + 1, 0

    def advance(self) -> None:
        """Record that one micro-batch has been trained on (on every rank)."""
        for samples in (0, self.global_batch):  # on more ranks than before the rest may be short
            self.position += samples
            if self.position + self.global_batch > self.length:
                self.epoch, self.position = self.epoch + 1, 0

    def state_dict(self) -> dict[str, int]:
        return {name: getattr(self, name) for name in ("epoch", "position", "length", "seed")}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue from `state`, of another number of ranks or another micro-batch size too."""
        for name, own in (("length", self.length), ("seed", self.seed)):
            if state.get(name) != own:
                what = f"the run to resume has a training set's {name} of {state.get(name)}"
                raise UserError(f"{what}, this one {own}: resume with the same data and --seed")
        self.epoch, self.position = state["epoch"], state["position"]
