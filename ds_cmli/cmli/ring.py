"""All-pairs CMLI over the ranks without gathering their texts: chunks of text go round, each rank scores its images.

The gradient of a chunk travels with it, one rank behind, and ends at the chunk's owner. A rank holds two chunks and two
of their gradients, whatever the number of ranks; argmax indices are not kept but computed again.

Shapes: B images and B texts per rank, P ranks, G = B * P, N patches, M text positions, D embedding dimension.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from ds_cmli.cmli.check import check_options
from ds_cmli.cmli.op import DEFAULT_SCRATCH_BYTES, cmli_gradients, cmli_scores
from ds_cmli.distributed import collectives
from ds_cmli.distributed import process_group as distributed
from ds_cmli.distributed.ring import ReturnedGradient, chunks

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
