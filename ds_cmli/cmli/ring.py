"""All-pairs CMLI over the ranks without gathering their texts: chunks of text go round, each rank scores its images.

The gradient of a chunk travels with it, one rank behind, and ends at the chunk's owner. A rank holds two chunks and two
of their gradients, whatever the number of ranks; argmax indices are not kept but computed again.

Shapes: B images and B texts per rank, P ranks, G = B * P, N patches, M text positions, D embedding dimension.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from ds_cmli.cmli import collectives
from ds_cmli.cmli.check import check_options
from ds_cmli.cmli.op import DEFAULT_SCRATCH_BYTES, cmli_gradients, cmli_scores
from ds_cmli.common import uniform
from ds_cmli.distributed import process_group as distributed

DEFAULT_GATHER_BYTES = 2**30
EXCHANGES = ("auto", "gather", "ring")


@dataclass(frozen=True)
class Scorer:
    """`cmli_scores` with its options, and how it comes to the texts of other ranks.

    exchange: "gather": every rank holds the texts of all, "ring": they go round, "auto": they go round where the
        gathered texts and their gradient would take more than `gather_bytes`.
    """

    backend: str = "auto"
    scratch_bytes: int = DEFAULT_SCRATCH_BYTES
    recompute: bool = False
    exchange: str = "auto"
    gather_bytes: int = DEFAULT_GATHER_BYTES

    def __post_init__(self):
        check_options(self.backend, self.scratch_bytes)
        if self.exchange not in EXCHANGES:
            known = ", ".join(EXCHANGES)
            raise ValueError(f"exchange={self.exchange!r} is unknown; it must be one of {known}")
        if not isinstance(self.gather_bytes, int) or self.gather_bytes < 0:
            raise ValueError(f"gather_bytes={self.gather_bytes!r} must be an int, not below 0")

    def __call__(
        self, image: Tensor, text: Tensor, token_mask: Tensor, image_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        options = {
            "backend": self.backend,
            "scratch_bytes": self.scratch_bytes,
            "recompute": self.recompute,
        }
        return cmli_scores(image, text, token_mask, image_mask, **options)  # type: ignore[arg-type]

    def goes_round(self, text: Tensor, group: dist.ProcessGroup | None = None) -> bool:
        """Whether texts [B, M, D] of each rank, equal in shape, go round."""
        ranks = distributed.world_size(group)
        gathered = (
            ranks
            * text.numel()
            * (text.dtype.itemsize + collectives.accumulated(text.dtype).itemsize)
        )
        return ranks > 1 and (
            self.exchange == "ring" or (self.exchange == "auto" and gathered > self.gather_bytes)
        )


DEFAULT_SCORER = Scorer()


def ring_scores(
    image: Tensor,
    text: Tensor,
    token_mask: Tensor,
    image_mask: Tensor | None = None,
    *,
    group: dist.ProcessGroup | None = None,
    score: Scorer,
) -> tuple[Tensor, Tensor]:
    """s_i2t and s_t2i [B, G] of this rank's images and the texts of all ranks, as `cmli_scores` of gathered texts.

    Args:
        image: [B, N, D]; text: [B, M, D], of equal shape on all ranks; token_mask: bool [B, M]; image_mask: bool [B, N]
            or None = all valid. B may differ between image and text.

    The gradient of the texts is the sum over what all ranks computed with them. Collective, in forward and in backward.
    """
    return _RingScores.apply(image, text, token_mask, image_mask, group, score)  # type: ignore[no-untyped-call]


class _RingScores(torch.autograd.Function):
    @staticmethod
    def forward(ctx, image, text, token_mask, image_mask, group, score):
        shape = len(image), distributed.world_size(group) * len(text)
        s_i2t, s_t2i = (
            image.new_empty(shape, dtype=collectives.accumulated(image.dtype)) for _ in range(2)
        )
        for owner, chunk, mask in chunks(text, token_mask, group):  # collective
            found = scores_from(owner * len(text), score, image, chunk, mask, image_mask)
            for whole, part in zip((s_i2t, s_t2i), found, strict=True):
                whole[:, owner * len(text) : (owner + 1) * len(text)] = part
            del found, part
        ctx.save_for_backward(image, text, token_mask, image_mask)
        ctx.group, ctx.score = group, score
        return s_i2t, s_t2i

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_i2t, grad_t2i):
        image, text, token_mask, image_mask = ctx.saved_tensors
        need_image, need_text = ctx.needs_input_grad[:2]
        J, wide = len(text), collectives.accumulated(text.dtype)
        of_images, of_texts = None, ReturnedGradient(ctx.group)
        for owner, chunk, mask in chunks(text, token_mask, ctx.group):  # collective
            grads = (g[:, owner * J : (owner + 1) * J] for g in (grad_i2t, grad_t2i))
            d_image, d_text = gradients_from(
                owner * J, ctx.score, *grads, image, chunk, mask, image_mask, need_image, need_text
            )
            if need_image:
                of_images = (
                    d_image.to(wide) if of_images is None else of_images.add_(d_image.to(wide))
                )
            del d_image
            if need_text:
                of_texts.add(owner, d_text)  # collective
            del d_text
        return (
            of_images.to(image.dtype) if need_image else None,
            of_texts.sum().to(text.dtype) if need_text else None,
            *[None] * 4,
        )


def scores_from(
    first: int, score: Callable[..., tuple[Tensor, Tensor]], *inputs: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`score(*inputs)`, of this rank's images and a part of all texts, that from the text `first` on."""
    return score(*inputs)


def gradients_from(
    first: int, score: Scorer, *inputs: Tensor | bool | None
) -> tuple[Tensor, Tensor]:
    """The gradients of the same inputs, from those of their scores."""
    return cmli_gradients(*inputs, backend=score.backend, scratch_bytes=score.scratch_bytes)  # type: ignore[arg-type]


# --- the exchange: each rank sends a chunk to the next rank while it computes with it

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
        wide = collectives.accumulated(grad.dtype)
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
