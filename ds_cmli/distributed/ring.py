"""Text that goes round the ranks: each sends what it has to the next rank while it computes with it.

Memory is that of two chunks, whatever the number of ranks; a chunk is one rank's text features with their mask.

Shapes: B pairs per rank, M text positions, D embedding dimension.
"""

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from ds_cmli.common import uniform
from ds_cmli.distributed import process_group as distributed

TEXT, GRADIENT = 0, 1  # tags, by which gloo keeps apart what is under way at the same time


class Transfer:
    """`sent` goes to the next rank, and `received` comes from the one before: both until `wait` has returned.

    Contiguous, of one shape and dtype on all ranks. Collective.
    """

    def __init__(self, sent: Tensor, received: Tensor, tag: int, group: dist.ProcessGroup | None):
        rank, ranks = distributed.rank(group), distributed.world_size(group)
        after, before = (r if group is None else dist.get_global_rank(group, r) for r in neighbours(rank, ranks))
        send = dist.P2POp(dist.isend, sent, after, group, tag)
        receive = dist.P2POp(dist.irecv, received, before, group, tag)
        self.works = dist.batch_isend_irecv([send, receive])  # collective
        self.sent, self.received = sent, received

    def wait(self) -> Tensor:
        """`received`, as it has come."""
        with distributed.exchanging():
            for work in self.works:
                work.wait()
        return self.received


def neighbours(rank: int, ranks: int) -> tuple[int, int]:
    """The next rank, and the one before."""
    return (rank + 1) % ranks, (rank - 1) % ranks


def pack(text: Tensor, mask: Tensor) -> Tensor:
    """A chunk in one piece: [B, M, D], bool [B, M] -> bytes, uint8."""
    chunk = torch.empty(text.nbytes + mask.numel(), dtype=torch.uint8, device=text.device)
    for part, whole in zip(unpack(chunk, text), (text, mask), strict=True):
        part.copy_(whole)
    return chunk


def unpack(chunk: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """Views of a chunk: the text features, of the shape and dtype of `like`, and their mask."""
    text = chunk[: like.nbytes].view(like.dtype).view(like.shape)
    return text, chunk[like.nbytes :].view(torch.bool).view(like.shape[:2])


def buffer_like(x: Tensor) -> Tensor:
    """What a tensor of another rank will be received in."""
    return torch.empty_like(x)


def chunks(text: Tensor, mask: Tensor, group: dist.ProcessGroup | None) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(rank, its text features, its mask) of each rank in turn, this rank first.

    What it yields holds until the next one is asked for, and is sent on meanwhile. Collective.
    """
    rank, ranks = distributed.rank(group), distributed.world_size(group)
    chunk = pack(text, mask)
    other = buffer_like(chunk)
    for step in uniform.turns(range(ranks)):
        transfer = Transfer(chunk, other, TEXT, group) if step < ranks - 1 else None  # collective
        yield (rank - step) % ranks, *unpack(chunk, text)
        if transfer is not None:
            chunk, other = transfer.wait(), chunk
