"""Which samples of each source an epoch takes, and in which order: pure functions of the seed and the epoch.

S sources, L draws (samples) per epoch.
"""

import hashlib

import torch
from torch import Tensor


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
