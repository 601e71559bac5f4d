"""Which samples an epoch takes of each source, and in which order: pure functions of the seed and the epoch.

S sources, L draws of an epoch.
"""

import hashlib

import torch
from torch import Tensor


def permutation(length: int, *key: int) -> Tensor:
    """int64 [length], a pure function of its arguments."""
    digest = hashlib.sha256(" ".join(map(str, key)).encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    return torch.randperm(length, generator=generator)


class Mixture:
    """Samples of S sources, numbered one source after the other.

    Without weights an epoch takes every sample once. With weights it is as long, and takes its share of each source
    from where the epoch before left off in that source's own endless order: its samples in one permutation after the
    other. All samples of a source are thus taken before one of them comes again.

    Args:
        lengths: samples of each source.
        weights: in any unit; their ratios count.
    """

    def __init__(self, lengths: list[int], weights: list[float] | None = None):
        self.lengths, self.draws = lengths, sum(lengths)
        if weights is None:
            self.shares = list(lengths)
            return
        exact = [weight / sum(weights) * self.draws for weight in weights]
        self.shares = [int(x) for x in exact]
        by_rest = sorted(range(len(exact)), key=lambda s: self.shares[s] - exact[s])  # the largest first
        for source in by_rest[: self.draws - sum(self.shares)]:
            self.shares[source] += 1

    def order(self, seed: int, epoch: int) -> tuple[Tensor, Tensor]:
        """The samples of an epoch, int64 [L], and how often each was taken before, int32 [L]."""
        order = permutation(self.draws, seed, epoch)
        if self.shares == self.lengths:
            return order, torch.tensor(epoch, dtype=torch.int32).expand(self.draws)
        indices, turns, first = [], [], 0
        for source, (length, share) in enumerate(zip(self.lengths, self.shares, strict=True)):
            position, end = epoch * share, (epoch + 1) * share
            while position < end:
                turn, start = divmod(position, length)
                count = min(length - start, end - position)
                indices.append(first + permutation(length, seed, source, turn)[start : start + count])
                turns.append(torch.full((count,), turn, dtype=torch.int32))
                position += count
            first += length
        return torch.cat(indices)[order], torch.cat(turns)[order]
