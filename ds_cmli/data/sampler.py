"""Which samples of each source an epoch takes, and in which order: pure functions of the seed and the epoch.

S sources, L draws (samples) per epoch.
"""

import hashlib
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ds_cmli.common.errors import UserError
from ds_cmli.data.batch import Batch


def permutation(length: int, *key: int) -> Tensor:
    """A random permutation, int64 [length], that is a pure function of the arguments."""
    digest = hashlib.sha256(" ".join(map(str, key)).encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    return torch.randperm(length, generator=generator)


class Mixture:
    """Epochs over the samples of S sources, which are numbered one source after the other.

    Without weights an epoch takes every sample once. With weights it has the same length and takes from each source its
    share, at least one sample. Each source has an endless order, one permutation of its samples after the other, in
    which an epoch continues where the epoch before stopped. All samples of a source are thus taken before one of them
    is repeated.

    Args:
        lengths: number of samples in each source.
        weights: one per source; only their ratios matter.

    Attributes:
        raised: the sources whose weight asks for less than half a sample an epoch, and which get one all the same.
    """

    def __init__(self, lengths: list[int], weights: list[float] | None = None):
        self.lengths, self.draws = lengths, sum(lengths)
        self.raised: list[int] = []
        if weights is None:
            self.shares = list(lengths)
            return
        scaled = [
            weight / max(weights) for weight in weights
        ]  # their sum is finite whatever the weights are
        exact = [weight / sum(scaled) * self.draws for weight in scaled]
        self.shares = [max(1, int(x)) for x in exact]
        by_rest = sorted(
            range(len(exact)), key=lambda s: self.shares[s] - exact[s]
        )  # largest remainder first
        for source in by_rest[: max(0, self.draws - sum(self.shares))]:
            self.shares[source] += 1
        for _ in range(
            sum(self.shares) - self.draws
        ):  # what the smallest were given beyond their shares
            self.shares[self.shares.index(max(self.shares))] -= 1
        self.raised = [source for source, x in enumerate(exact) if x < 0.5]

    def order(self, seed: int, epoch: int) -> tuple[Tensor, Tensor]:
        """The indices of an epoch's samples, int64 [L], and how often each has been taken before, int32 [L]."""
        order = permutation(self.draws, seed, epoch)
        if self.shares == self.lengths:
            return order, torch.tensor(epoch, dtype=torch.int32).expand(self.draws)
        indices, turns, first = [], [], 0
        for source, (length, share) in enumerate(zip(self.lengths, self.shares, strict=True)):
            position, end = epoch * share, (epoch + 1) * share
            while position < end:
                turn, start = divmod(position, length)
                count = min(length - start, end - position)
                indices.append(
                    first + permutation(length, seed, source, turn)[start : start + count]
                )
                turns.append(torch.full((count,), turn, dtype=torch.int32))
                position += count
            first += length
        return torch.cat(indices)[order], torch.cat(turns)[order]


class Draw(NamedTuple):
    """One request of the sampler to a data set."""

    sample: int  # the sample's index
    turn: int  # how often this sample has been requested before; without weights this is the epoch, from 0


class GlobalBatchSampler:
    """A batch sampler for `DataLoader(batch_sampler=...)` that yields lists of B `Draw`s without end, across epochs.

    Global micro-batch k of an epoch is order[k*G : (k+1)*G], of which rank r takes the r-th B samples. P ranks with B
    samples each and one rank with P*B thus see the same global batches. An incomplete last batch is dropped.

    Iteration starts at the position that the trainer has *consumed*, which only `advance` moves: a loader's prefetching
    does not. The position counts samples of the global order, so a run on any other number of ranks can resume from it.
    """

    def __init__(
        self, samples: int | Mixture, micro_batch: int, rank: int, world_size: int, seed: int
    ):
        mixture = Mixture([samples]) if isinstance(samples, int) else samples
        length = mixture.draws
        if length < micro_batch * world_size:
            raise UserError(
                f"the training set has {length} samples, fewer than one global batch of {micro_batch * world_size} = "
                f"{micro_batch} (micro-batch) x {world_size} (ranks): lower the micro-batch or add data"
            )
        self.mixture, self.length, self.seed = mixture, length, seed
        self.micro_batch, self.rank, self.world_size = micro_batch, rank, world_size
        self.epoch, self.position = 0, 0

    @property
    def global_batch(self) -> int:
        return self.micro_batch * self.world_size

    @property
    def batches_per_epoch(self) -> int:
        return self.length // self.global_batch

    def __iter__(self) -> Iterator[list[Draw]]:
        epoch, position = self.epoch, self.position
        while True:
            # Copied out of PyTorch's memory: --profile-memory would count them as the step's.
            indices, turns = (each.numpy().copy() for each in self.mixture.order(self.seed, epoch))
            for start in range(position, self.length - self.global_batch + 1, self.global_batch):
                mine = start + self.rank * self.micro_batch
                here = slice(mine, mine + self.micro_batch)
                yield [
                    Draw(*draw)
                    for draw in zip(indices[here].tolist(), turns[here].tolist(), strict=True)
                ]
            epoch, position = epoch + 1, 0

    def checked(self, batch: Batch) -> Batch:
        """Return the loader's micro-batch unchanged. Raises `UserError` if pairs, and thus negatives, are missing."""
        if len(batch.index) != self.micro_batch:
            raise UserError(
                f"the data gave a micro-batch of {len(batch.index)} pairs instead of {self.micro_batch}, with fewer "
                "negatives: a source must give one pair for each index"
            )
        return batch

    def advance(self) -> None:
        """Record that one micro-batch has been trained on (on every rank)."""
        if (
            self.position + self.global_batch > self.length
        ):  # after resuming on more ranks, the rest may be too short
            self.epoch, self.position = self.epoch + 1, 0
        self.position += self.global_batch
        if self.position + self.global_batch > self.length:
            self.epoch, self.position = self.epoch + 1, 0

    def state_dict(self) -> dict[str, int]:
        return {
            "epoch": self.epoch,
            "position": self.position,
            "length": self.length,
            "seed": self.seed,
        }

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue from `state`, which may come from another number of ranks or another micro-batch size.

        Raises:
            UserError: the state belongs to another order: its training set had another length, or its seed differs.
        """
        for name, here in (("length", self.length), ("seed", self.seed)):
            if state[name] != here:
                raise UserError(
                    f"the run to resume has a training set's {name} of {state[name]}, this one {here}: "
                    "resume with the same data and --seed"
                )
        self.epoch, self.position = state["epoch"], state["position"]
