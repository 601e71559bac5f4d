"""Keeping a share of the features of each image and text.

`select`, FILIP's approximation of the all-pairs scores (Yao et al., 2021, who keep 25%): of each
image the patches with the highest maximum similarity to the texts of its rank's micro-batch, of
each text its tokens likewise, before anything is exchanged between ranks. The selection passes no
gradient, and depends on which pairs a rank's micro-batch holds.

`PatchKeep`, patch dropout as in FLIP (Li et al., 2023, arXiv 2212.00794): random patches, which the
image encoder sees alone.

Shapes: B images and B texts of a micro-batch, N patches, M text positions, D embedding dimension; n
    and m are kept.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ds_cmli.cmli.inputs import full_precision
from ds_cmli.cmli.loss import l2_normalize

# Odd 64-bit constants of splitmix64 (Steele et al., 2014), as signed integers.
STEPS = (-0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15)


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
        return taken(image, self.patches), taken(text, self.tokens)


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


def taken(x: Tensor, index: Tensor) -> Tensor:
    """The features at these places: [B, N, *], int64 [B, n] -> [B, n, *]."""
    return x.gather(1, index[:, :, None].expand(-1, -1, x.shape[2]))


class PatchKeep:
    """Chooses n = ceil(share * N) patches of each image.

    Args:
        seed: of the run.
    """

    def __init__(self, share: float, patches: int, seed: int):
        self.patches, self.kept, self.seed = patches, kept(share, patches), seed

    def places(self, index: Tensor, step: int) -> Tensor:
        """The places of the kept patches, in their order: int64 [B] samples -> int64 [B, n]."""
        image = _mixed(index + (self.seed * STEPS[0] + step * STEPS[1]) % (1 << 62))  # [B]
        patch = torch.arange(self.patches, device=index.device)
        keys = _mixed(image[:, None] + patch * STEPS[0])  # [B, N]
        return keys.argsort(1)[:, : self.kept].sort(1).values


def _mixed(x: Tensor) -> Tensor:
    """Hash int64 numbers to pseudorandom ones, as splitmix64's last steps do."""
    for shift, factor in ((30, STEPS[1]), (27, STEPS[2])):
        # A shift keeps the sign, which splitmix64's would not: the lower bits are mixed as well.
        x = (x ^ (x >> shift)) * factor
    return x ^ (x >> 31)
