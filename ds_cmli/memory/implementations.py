"""The ways to compute what E1 to E3 are about, as code that runs: what each stores is measured, not argued.

`broadcast` stores every product of every dot product, as the document counts; `materialised` lets a matrix product
store one number for each; `ours` is what this project trains with. One process stands for one rank: where a rank
would gather the other ranks' texts (or, in the first two of E1, images too), they are given.

Shapes: B pairs per rank, G = B * P, I images (B or G), N image patches, M text positions, H hidden size, D matching
space.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ds_cmli.cmli import cmli_scores
from ds_cmli.losses import functions as losses
from ds_cmli.memory.estimates import SPECIAL_TOKENS, Setting


def broadcast_dots(x: Tensor, y: Tensor) -> Tensor:
    """Dot products over the last dimension of tensors that broadcast, every single product stored on the way."""
    return (x * y).sum(-1)


def cmli_from(similarities: Tensor, text_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Both scores [I, G] from [I, N, G, M], masked tokens at minus infinity; each text has a valid token."""
    s_i2t = similarities.max(3).values.mean(1)
    best = similarities.max(1).values.masked_fill(~text_mask, 0)  # [I, G, M]
    return s_i2t, best.sum(2) / text_mask.sum(1)


def broadcast_scores(image: Tensor, text: Tensor, text_mask: Tensor, image_mask: None = None) -> tuple[Tensor, Tensor]:
    """CMLI of all pairs as the document counts it: [I, N, G, M, D] is stored. Arguments as `cmli_scores`."""
    similarities = broadcast_dots(losses.widen(image)[:, :, None, None], losses.widen(text))
    return cmli_from(similarities.masked_fill_(~text_mask, -torch.inf), text_mask)


def materialised_scores(
    image: Tensor, text: Tensor, text_mask: Tensor, image_mask: None = None, *, narrow: bool = False
) -> tuple[Tensor, Tensor]:
    """CMLI of all pairs by one matrix product, all similarities stored: [I, N, G, M]. Arguments as `cmli_scores`.

    Plain autograd. `narrow` stores 16-bit inputs' similarities in 16 bits and lets rounding decide between maxima.
    """
    if not narrow:
        image, text = losses.widen(image), losses.widen(text)
    similarities = image.flatten(0, 1) @ text.flatten(0, 1).t()  # [I*N, G*M]
    # In place and before the view: a copy of this tensor is what nobody can afford.
    similarities.masked_fill_(~text_mask.flatten(), -torch.inf)
    s_i2t, s_t2i = cmli_from(similarities.view(*image.shape[:2], *text.shape[:2]), text_mask)
    return losses.widen(s_i2t), losses.widen(s_t2i)


def global_loss(dots: Callable[[Tensor, Tensor], Tensor], image: Tensor, text: Tensor, logit_scale: Tensor) -> Tensor:
    scores = dots(image, text)
    return losses.contrastive_loss(scores, scores, logit_scale)


def cmli_loss(scores: Callable, image: Tensor, text: Tensor, text_mask: Tensor, logit_scale: Tensor) -> Tensor:
    s_i2t, s_t2i = scores(image, text, text_mask)
    return losses.contrastive_loss(s_i2t, s_t2i, logit_scale)


def broadcast_match(tokens: Tensor, patches: Tensor) -> Tensor:
    """[B, M, D], [B, N, D] -> the best patch of each token, int64 [B, M]; [B, N, M, D] is stored."""
    return broadcast_dots(patches[:, :, None], tokens[:, None]).argmax(1)


def materialised_match(tokens: Tensor, patches: Tensor) -> Tensor:
    """The same; [B, N, M] is stored."""
    return (patches @ tokens.transpose(1, 2)).argmax(1)


def unit_rows(*shape: int, dtype: torch.dtype, device: str) -> Tensor:
    return F.normalize(torch.randn(shape, device=device), dim=-1).to(dtype)


def global_inputs(images: int, s: Setting, device: str) -> tuple[Tensor, ...]:
    rows = partial(unit_rows, dtype=torch.float32, device=device)
    return rows(images, s.H).requires_grad_(), rows(s.G, s.H).requires_grad_(), _logit_scale(device)


def cmli_inputs(images: int, tokens: int, s: Setting, device: str) -> tuple[Tensor, ...]:
    rows = partial(unit_rows, dtype=torch.float32, device=device)
    image, text = rows(images, s.N, s.D).requires_grad_(), rows(s.G, tokens, s.D).requires_grad_()
    return image, text, torch.ones(s.G, tokens, dtype=torch.bool, device=device), _logit_scale(device)


def match_inputs(tokens: int, s: Setting, device: str) -> tuple[Tensor, ...]:
    # No gradient: an index passes none.
    rows = partial(unit_rows, dtype=torch.float16, device=device)
    return rows(s.B, tokens, s.D), rows(s.B, s.N, s.D)


def _logit_scale(device: str) -> Tensor:
    return torch.zeros(1, device=device, requires_grad=True)


@dataclass(frozen=True)
class Implementation:
    inputs: Callable[[str], tuple[Tensor, ...]]  # device -> arguments of `forward`
    forward: Callable[..., Tensor]  # a scalar loss, or an index without gradient


def implementations(s: Setting, backend: str = "auto") -> dict[tuple[str, str], Implementation]:
    """(claim's id, name) -> what runs, in the setting `s`; the names are those of `Claim.stored`.

    `backend`: of the all-pairs op.
    """
    kept = s.M - SPECIAL_TOKENS
    blocks = {"all": partial(cmli_inputs, s.G, s.M, s), "row": partial(cmli_inputs, s.B, s.M, s)}
    return {
        ("E1", "broadcast"): Implementation(
            partial(global_inputs, s.G, s), partial(global_loss, lambda x, y: broadcast_dots(x[:, None], y))
        ),
        ("E1", "materialised"): Implementation(partial(global_inputs, s.G, s), partial(global_loss, _product)),
        ("E1", "ours"): Implementation(partial(global_inputs, s.B, s), partial(global_loss, _product)),
        ("E2", "broadcast"): Implementation(blocks["all"], partial(cmli_loss, broadcast_scores)),
        ("E2", "materialised"): Implementation(blocks["row"], partial(cmli_loss, materialised_scores)),
        ("E2", "ours"): Implementation(blocks["row"], partial(cmli_loss, partial(cmli_scores, backend=backend))),
        ("E2", "materialised, all"): Implementation(blocks["all"], partial(cmli_loss, materialised_scores)),
        ("E3", "broadcast"): Implementation(partial(match_inputs, s.M, s), broadcast_match),
        ("E3", "materialised"): Implementation(partial(match_inputs, s.M, s), materialised_match),
        ("E3", "ours"): Implementation(partial(match_inputs, s.M, s), losses.match_patches),
        ("E5", f"E2 materialised, {kept} of {s.M}"): Implementation(
            partial(cmli_inputs, s.B, kept, s), partial(cmli_loss, materialised_scores)
        ),
        ("E5", f"E3 materialised, {kept} of {s.M}"): Implementation(partial(match_inputs, kept, s), materialised_match),
    }


def _product(image: Tensor, text: Tensor) -> Tensor:
    return image @ text.t()
