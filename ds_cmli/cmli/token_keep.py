"""FILIP's approximation of the all-pairs scores: of each image and text the few features that match
best.

As in FILIP (Yao et al., 2021), which keeps 25%, each image keeps the patches with the highest
maximum similarity to the texts of its rank's micro-batch, and each text its tokens likewise, before
anything is exchanged between ranks. The selection passes no gradient, and depends on which pairs a
rank's micro-batch holds.

Shapes: B images and B texts of a micro-batch, N patches, M text positions, D embedding dimension; n
    and m are kept.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ds_cmli.cmli.inputs import full_precision
from ds_cmli.cmli.loss import l2_normalize


def kept(share: float, number: int) -> int:
    """The number of features that are kept of `number`, rounded up, so that one always is."""
    return math.ceil(share * number)


@dataclass
class Selection:
    patches: Tensor  # int64 [B, n], places among N
    tokens: Tensor  # int64 [B, m], among M
    token_mask: Tensor  # bool [B, m], of the kept tokens

    def of(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """[B, N, D], [B, M, D] -> [B, n, D], [B, m, D]."""
        return _taken(image, self.patches), _taken(text, self.tokens)


@torch.no_grad()
def select(
    image: Tensor, text: Tensor, token_mask: Tensor, share: float, scratch_bytes: int
) -> Selection:
    """Select the patches and tokens that are most similar to any feature of the other side.

    Similarity is the cosine, and the other side that of the micro-batch.

    Args:
        image: [B, N, D]; text: [B, M, D]; token_mask: bool [B, M], True = valid.
        share: n = ceil(share * N) patches are kept, and ceil(share * M_j) of M_j valid tokens.
            Ties: the first.
        scratch_bytes: bound on the similarities that are there at a time, of one patch at least.
    """
    with full_precision(image.device):
        unit = l2_normalize(image), l2_normalize(text)
        of_patches, of_tokens = _best(*unit, token_mask, scratch_bytes)
    n, m = kept(share, image.shape[1]), kept(share, text.shape[1])
    patches = of_patches.argsort(dim=1, descending=True, stable=True)
    tokens = of_tokens.argsort(dim=1, descending=True, stable=True)
    valid = (token_mask.sum(1, keepdim=True).double() * share).ceil()  # [B, 1]
    mask = torch.arange(m, device=text.device) < valid  # [B, m]
    return Selection(patches[:, :n].clone(), tokens[:, :m].clone(), mask)


def _best(
    image: Tensor, text: Tensor, token_mask: Tensor, scratch_bytes: int
) -> tuple[Tensor, Tensor]:
    """The highest similarity of each patch [B, N], and of each token [B, M], where padding has
    -inf."""
    patches, tokens = image.flatten(0, 1), text.flatten(0, 1)  # [B * N, D], [B * M, D]
    padding = torch.zeros_like(tokens[:, 0]).masked_fill_(~token_mask.flatten(), -torch.inf)
    of_patches = padding.new_empty(len(patches))
    of_tokens = torch.full_like(padding, -torch.inf)
    rows = max(1, scratch_bytes // (len(tokens) * tokens.dtype.itemsize))
    for first in range(0, len(patches), rows):
        similarities = (patches[first : first + rows] @ tokens.t()).add_(padding)
        of_patches[first : first + rows] = similarities.amax(1)
        torch.maximum(of_tokens, similarities.amax(0), out=of_tokens)
        del similarities
    return of_patches.view(image.shape[:2]), of_tokens.view(text.shape[:2])


def _taken(x: Tensor, index: Tensor) -> Tensor:
    return x.gather(1, index[:, :, None].expand(-1, -1, x.shape[2]))
