"""All-pairs CMLI over the ranks without gathering their texts: chunks of text pass round a ring.

A chunk is one rank's text features with their mask. Each rank scores its images with a chunk while
it sends the chunk to the next rank. The gradient of a chunk travels with it, one rank behind, and
ends at the chunk's owner. A rank holds two chunks and two of their gradients, whatever the number
of ranks; argmax indices are not kept but computed again.

Shapes: B images and B texts per rank, P ranks, G = B * P, N patches, M text positions,
D embedding dimension.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, TypedDict

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from ds_cmli.cmli import collectives
from ds_cmli.cmli.inputs import Sides, Wanted, check_options
from ds_cmli.cmli.op import DEFAULT_SCRATCH_BYTES, cmli_gradients, cmli_scores
from ds_cmli.common.probe import probe

DEFAULT_GATHER_BYTES = 2**30
EXCHANGES = ("auto", "gather", "ring")
TEXT, GRADIENT = 0, 1  # tags, by which gloo distinguishes simultaneous messages

Score = Callable[..., tuple[Tensor, Tensor]]  # `cmli_scores` with its options


class OpOptions(TypedDict):
    backend: str
    scratch_bytes: int
    recompute: bool


@dataclass(frozen=True)
class Scorer:
    """`cmli_scores` with its options, and how it comes to the texts of other ranks.

    exchange: "gather": every rank holds the texts of all; "ring": they pass round a ring; "auto":
        they do so where the gathered texts and their gradient would take more than `gather_bytes`.
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
        return cmli_scores(image, text, token_mask, image_mask, **self.of_op)

    @property
    def of_op(self) -> OpOptions:
        """The options of `cmli_scores`."""
        return OpOptions(
            backend=self.backend, scratch_bytes=self.scratch_bytes, recompute=self.recompute
        )

    def goes_round(self, text: Tensor, group: dist.ProcessGroup | None = None) -> bool:
        """Whether texts, [B, M, D] on each rank, pass round a ring instead of being gathered."""
        ranks = collectives.world_size(group)
        width = text.dtype.itemsize + collectives.accumulated(text.dtype).itemsize
        too_large = ranks * text.numel() * width > self.gather_bytes
        return ranks > 1 and (self.exchange == "ring" or (self.exchange == "auto" and too_large))


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
    """s_i2t and s_t2i [B, G] of this rank's images and the texts of all ranks.

    They equal those of `cmli_scores` with gathered texts. The gradient of the texts is the sum over
    what all ranks computed with them. Collective, in forward and in backward.

    Args:
        image: [B, N, D]. B may differ between image and text.
        text: [B, M, D], of equal shape on all ranks.
        token_mask: bool [B, M].
        image_mask: bool [B, N]; None: all are valid.
    """
    arguments = image, text, token_mask, image_mask, group, score
    return _RingScores.apply(*arguments)  # type: ignore[no-untyped-call]


class _RingScores(torch.autograd.Function):
    @staticmethod
    def forward(ctx, image, text, token_mask, image_mask, group, score):
        J, G = len(text), collectives.world_size(group) * len(text)
        with probe.scope("CMLI op"):
            dtype = collectives.accumulated(image.dtype)
            s_i2t = image.new_empty((len(image), G), dtype=dtype)
            s_t2i = image.new_empty((len(image), G), dtype=dtype)
            for owner, chunk, mask in chunks(text, token_mask, group):  # collective
                columns = slice(owner * J, (owner + 1) * J)
                probe.texts_from(columns.start)
                s_i2t[:, columns], s_t2i[:, columns] = score(image, chunk, mask, image_mask)
        ctx.save_for_backward(image, text, token_mask, image_mask)
        ctx.group, ctx.score = group, score
        return s_i2t, s_t2i

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_i2t, grad_t2i):
        image, text, token_mask, image_mask = ctx.saved_tensors
        wanted, wide = Wanted(*ctx.needs_input_grad[:2]), collectives.accumulated(text.dtype)
        of_images: Tensor | None = None
        of_texts, J = ReturnedGradient(ctx.group), len(text)
        with probe.scope("CMLI op"):
            for owner, chunk, mask in chunks(text, token_mask, ctx.group):  # collective
                columns = slice(owner * J, (owner + 1) * J)
                probe.texts_from(columns.start)
                grads = grad_i2t[:, columns], grad_t2i[:, columns]
                sides = Sides(image, chunk, mask, image_mask)
                d_image, d_text = cmli_gradients(
                    grads,
                    sides,
                    wanted,
                    backend=ctx.score.backend,
                    scratch_bytes=ctx.score.scratch_bytes,
                )
                if wanted.image:
                    of_images = add_wide(of_images, d_image, wide)
                del d_image  # before the next ones exist
                if wanted.text:
                    of_texts.add(owner, d_text)  # collective
                del d_text
            image_gradient = text_gradient = None
            if of_images is not None:
                image_gradient = of_images.to(image.dtype)
            if wanted.text:
                text_gradient = of_texts.sum().to(text.dtype)
        return image_gradient, text_gradient, None, None, None, None


def add_wide(total: Tensor | None, x: Tensor, wide: torch.dtype) -> Tensor:
    """The total with `x` added in place, in the dtype `wide`; None: there is nothing yet."""
    x = x.to(wide)
    return x if total is None else total.add_(x)


class Transfer:
    """Sends `sent` to the next rank and receives `received` from the one before.

    Both are in use until `wait` returns. They are contiguous and have the same shape and dtype on
    all ranks. Collective.
    """

    def __init__(
        self, sent: Tensor, received: Tensor | None, tag: int, group: dist.ProcessGroup | None
    ):
        """`received`: the buffer to receive into; None: a new one."""
        if received is None:
            with probe.scope("exchanged text"):
                received = torch.empty_like(sent)
        rank, ranks = collectives.rank(group), collectives.world_size(group)
        after, before = _global((rank + 1) % ranks, group), _global((rank - 1) % ranks, group)
        send = dist.P2POp(dist.isend, sent, after, group, tag)
        receive = dist.P2POp(dist.irecv, received, before, group, tag)
        self.works = dist.batch_isend_irecv([send, receive])  # collective
        self.sent, self.received = sent, received

    def wait(self) -> Tensor:
        """Wait for both transfers and return `received`."""
        with probe.exchanging():
            for work in self.works:
                work.wait()
        return self.received


def _global(rank: int, group: dist.ProcessGroup | None) -> int:
    if group is None:
        return rank
    return dist.get_global_rank(group, rank)


def pack(text: Tensor, mask: Tensor) -> Tensor:
    """One contiguous tensor that holds a chunk: [B, M, D], bool [B, M] -> its bytes, uint8."""
    with probe.scope("exchanged text"):
        chunk = torch.empty(text.nbytes + mask.numel(), dtype=torch.uint8, device=text.device)
        for part, whole in zip(unpack(chunk, text), (text, mask), strict=True):
            part.copy_(whole)
        return chunk


def unpack(chunk: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """Views of a packed chunk: its text features, shaped and typed as `like`, and their mask."""
    text = chunk[: like.nbytes].view(like.dtype).view(like.shape)
    return text, chunk[like.nbytes :].view(torch.bool).view(like.shape[:2])


class TextChunk(NamedTuple):
    owner: int  # the rank whose texts these are
    text: Tensor  # [B, M, D]
    mask: Tensor  # bool [B, M]


def passed(chunk: Tensor, group: dist.ProcessGroup | None) -> Iterator[tuple[int, Tensor]]:
    """Yields each rank and its chunk in turn, this rank's first, contiguous and of equal shape.

    Yielded tensors, of which this rank's own is one, are valid until the next is requested;
    meanwhile they are sent on. Collective.
    """
    rank, ranks = collectives.rank(group), collectives.world_size(group)
    other = None
    for step in probe.turns(range(ranks)):
        transfer = None
        if step < ranks - 1:
            transfer = Transfer(chunk, other, TEXT, group)  # collective
        yield (rank - step) % ranks, chunk
        if transfer is not None:
            chunk, other = transfer.wait(), chunk


def chunks(text: Tensor, mask: Tensor, group: dist.ProcessGroup | None) -> Iterator[TextChunk]:
    """Yields the texts of each rank in turn as `passed` does. Collective."""
    for owner, chunk in passed(pack(text, mask), group):  # collective
        yield TextChunk(owner, *unpack(chunk, text))


class ReturnedGradient:
    """Adds up the gradients of chunks over the ranks.

    A gradient passes round the ring one rank behind its chunk, to the chunk's owner.
    """

    def __init__(self, group: dist.ProcessGroup | None):
        self.group, self.rank = group, collectives.rank(group)
        self.own: Tensor | None = None
        self.transfer: Transfer | None = None

    def add(self, owner: int, grad: Tensor) -> None:
        """Add this rank's gradient [B, M, D] of each of `chunks` in turn.

        It may be overwritten. Collective.
        """
        wide = collectives.accumulated(grad.dtype)
        if owner == self.rank:
            self.own = grad.to(wide)
            return
        # What the ranks between the chunk's owner and this one have added up, and this rank's
        # share.
        total = grad.to(wide) if self.transfer is None else self.transfer.wait().add_(grad.to(wide))
        self.transfer = None  # with what it has sent
        self.transfer = Transfer(total, None, GRADIENT, self.group)  # collective

    def sum(self) -> Tensor:
        """The gradient of this rank's chunk, summed over all ranks, in fp32 (fp64).

        Ends the exchange.
        """
        assert self.own is not None
        if self.transfer is not None:
            self.own.add_(self.transfer.wait())
            self.transfer = None
        return self.own
