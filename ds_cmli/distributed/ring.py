"""Passes texts round a ring of ranks: each rank sends a chunk to the next rank while it computes with it.

A chunk is one rank's text features with their mask. Two chunks are in memory, however many ranks there are.

Shapes: B pairs per rank, M text positions, D embedding dimension.
"""

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from ds_cmli.common import uniform
from ds_cmli.distributed import process_group as distributed
from ds_cmli.distributed.collectives import accumulated

TEXT, GRADIENT = 0, 1  # tags, by which gloo distinguishes simultaneous messages


class Transfer:
    """Sends `sent` to the next rank and receives `received` from the one before; both are in use until `wait` returns.

    The tensors are contiguous and have the same shape and dtype on all ranks. Collective.
    """

    def __init__(self, sent: Tensor, received: Tensor, tag: int, group: dist.ProcessGroup | None):
        rank, ranks = distributed.rank(group), distributed.world_size(group)
        after, before = (
            r if group is None else dist.get_global_rank(group, r) for r in neighbours(rank, ranks)
        )
        send = dist.P2POp(dist.isend, sent, after, group, tag)
        receive = dist.P2POp(dist.irecv, received, before, group, tag)
        self.works = dist.batch_isend_irecv([send, receive])  # collective
        self.sent, self.received = sent, received

    def wait(self) -> Tensor:
        """Wait for both transfers and return `received`."""
        with distributed.exchanging():
            for work in self.works:
                work.wait()
        return self.received


def neighbours(rank: int, ranks: int) -> tuple[int, int]:
    """The next rank and the previous rank."""
    return (rank + 1) % ranks, (rank - 1) % ranks


def pack(text: Tensor, mask: Tensor) -> Tensor:
    """One contiguous tensor that holds a chunk: [B, M, D], bool [B, M] -> its bytes, uint8."""
    chunk = torch.empty(text.nbytes + mask.numel(), dtype=torch.uint8, device=text.device)
    for part, whole in zip(unpack(chunk, text), (text, mask), strict=True):
        part.copy_(whole)
    return chunk


def unpack(chunk: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """Views of a packed chunk: its text features, with the shape and dtype of `like`, and their mask."""
    text = chunk[: like.nbytes].view(like.dtype).view(like.shape)
    return text, chunk[like.nbytes :].view(torch.bool).view(like.shape[:2])


def buffer_like(x: Tensor) -> Tensor:
    """The buffer into which another rank's tensor of the same shape will be received."""
    return torch.empty_like(x)


def chunks(
    text: Tensor, mask: Tensor, group: dist.ProcessGroup | None
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yields (rank, its text features, its mask) for each rank in turn, this rank first.

    Yielded tensors are valid until the next ones are requested; meanwhile they are sent on. Collective.
    """
    rank, ranks = distributed.rank(group), distributed.world_size(group)
    chunk = pack(text, mask)
    other = buffer_like(chunk)
    for step in uniform.turns(range(ranks)):
        transfer = Transfer(chunk, other, TEXT, group) if step < ranks - 1 else None  # collective
        yield (rank - step) % ranks, *unpack(chunk, text)
        if transfer is not None:
            chunk, other = transfer.wait(), chunk


class ReturnedGradient:
    """Adds up the gradients of chunks over the ranks: a gradient goes round one rank behind its chunk, to its owner."""

    def __init__(self, group: dist.ProcessGroup | None):
        self.group, self.rank = group, distributed.rank(group)
        self.own: Tensor | None = None
        self.transfer: Transfer | None = None

    def add(self, owner: int, grad: Tensor) -> None:
        """Add this rank's gradient [B, M, D] of each of `chunks` in turn; it may be overwritten. Collective."""
        wide = accumulated(grad.dtype)
        if owner == self.rank:
            self.own = grad.to(wide)
            return
        # What the ranks between the chunk's owner and this one have added up, and then this rank's share.
        total = grad.to(wide) if self.transfer is None else self.transfer.wait().add_(grad.to(wide))
        self.transfer = None  # with what it has sent
        self.transfer = Transfer(total, buffer_like(total), GRADIENT, self.group)  # collective

    def sum(self) -> Tensor:
        """The gradient of this rank's chunk, summed over all ranks, in fp32 (fp64). Ends the exchange."""
        assert self.own is not None
        if self.transfer is not None:
            self.own.add_(self.transfer.wait())
            self.transfer = None
        return self.own
