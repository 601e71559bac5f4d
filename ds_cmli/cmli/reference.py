"""The oracle: CMLI written out over the whole similarity tensor, a few lines to be checked by eye.

Every other backend is tested against this one; training never imports it. It stores all of S and is
for small inputs.

Shape legend: I images, J texts, N patches, M text positions (padded), D features.
"""

import torch
from torch import Tensor


def first_maximum(S: Tensor, dim: int) -> Tensor:
    """Index of the maximum along `dim`; the lowest among equals; the first NaN where there is
    one."""
    shape = [-1 if d == dim % S.ndim else 1 for d in range(S.ndim)]
    index = torch.arange(S.shape[dim], device=S.device).view(shape)
    best = S.amax(dim, keepdim=True)
    hit = (best == S) | S.isnan()
    return torch.where(hit, index, S.shape[dim]).amin(dim)


def cmli_scores_reference(
    image: Tensor, text: Tensor, token_mask: Tensor, image_mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """CMLI scores of all pairs, equations (1)-(4) (FILIP, arXiv 2111.07783, eq. 4-5), by plain
    autograd.

    Arguments, shapes and results as `ds_cmli.cmli.cmli_scores`. 16-bit inputs are multiplied in
    fp32.
    """
    if image_mask is None:
        image_mask = torch.ones(image.shape[:2], dtype=torch.bool, device=image.device)
    dtype = torch.promote_types(image.dtype, torch.float32)
    # A masked feature may hold anything, NaN included: it is zeroed here and its similarities are
    # taken out below.
    image = image.to(dtype).masked_fill(~image_mask[..., None], 0)
    text = text.to(dtype).masked_fill(~token_mask[..., None], 0)

    S = torch.einsum("ind,jmd->ijnm", image, text)
    patch = image_mask[:, None, :]  # [I, 1, N]
    token = token_mask[None, :, :]  # [1, J, M]

    over_tokens = S.masked_fill(~token[:, :, None, :], -torch.inf)
    best = over_tokens.gather(3, first_maximum(over_tokens, 3)[..., None])[..., 0]  # [I, J, N]
    s_i2t = torch.where(patch, best, 0).sum(2) / patch.sum(2).clamp(min=1)

    over_patches = S.masked_fill(~patch[..., None], -torch.inf)
    best = over_patches.gather(2, first_maximum(over_patches, 2)[:, :, None, :])[
        :, :, 0
    ]  # [I, J, M]
    s_t2i = torch.where(token, best, 0).sum(2) / token.sum(2).clamp(min=1)

    nothing = ~(patch.any(2) & token.any(2))  # an image without patches, a text without tokens
    return s_i2t.masked_fill(nothing, 0), s_t2i.masked_fill(nothing, 0)
