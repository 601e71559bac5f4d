"""The oracle: CMLI written out over the whole similarity tensor, a few lines to be checked by eye.

Every implementation is tested against this one; it stores all of S and is for small inputs.

Shapes: I images, J texts, N patches, M text positions (padded), D features.
"""

import torch
from torch import Tensor


def first_maximum(S: Tensor, dim: int) -> Tensor:
    """Index of the maximum along `dim`: the lowest among equals; the first NaN, if any."""
    shape = [-1 if d == dim % S.ndim else 1 for d in range(S.ndim)]
    index = torch.arange(S.shape[dim], device=S.device).view(shape)
    hit = (S.amax(dim, keepdim=True) == S) | S.isnan()
    return torch.where(hit, index, S.shape[dim]).amin(dim)


def cmli_scores_reference(
    image: Tensor, text: Tensor, token_mask: Tensor, patch_mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """CMLI scores of all pairs by plain autograd: equations (1)-(4), in FILIP (arXiv 2111.07783)
    4 and 5. Arguments and results as of `cmli_scores`. 16-bit inputs are multiplied in fp32."""
    if patch_mask is None:
        patch_mask = torch.ones(image.shape[:2], dtype=torch.bool, device=image.device)
    dtype = torch.promote_types(image.dtype, torch.float32)
    # A masked feature may hold anything, NaN included: it is zeroed here and its similarities are
    # taken out below.
    image = image.to(dtype).masked_fill(~patch_mask[..., None], 0)
    text = text.to(dtype).masked_fill(~token_mask[..., None], 0)

    S = torch.einsum("ind,jmd->ijnm", image, text)
    patch = patch_mask[:, None, :]  # [I, 1, N]
    token = token_mask[None, :, :]  # [1, J, M]

    over_tokens = S.masked_fill(~token[:, :, None, :], -torch.inf)
    best = over_tokens.gather(3, first_maximum(over_tokens, 3)[..., None])[..., 0]  # [I, J, N]
    s_i2t = torch.where(patch, best, 0).sum(2) / patch.sum(2).clamp(min=1)

    over_patches = S.masked_fill(~patch[..., None], -torch.inf)
    best = over_patches.gather(2, first_maximum(over_patches, 2)[:, :, None])[:, :, 0]  # [I, J, M]
    s_t2i = torch.where(token, best, 0).sum(2) / token.sum(2).clamp(min=1)

    nothing = ~(patch.any(2) & token.any(2))  # an image without patches, a text without tokens
    return s_i2t.masked_fill(nothing, 0), s_t2i.masked_fill(nothing, 0)


def pair_loss_reference(
    s_i2t: Tensor, s_t2i: Tensor, learned: Tensor, duplicates: Tensor | None = None
) -> Tensor:
    """Return the loss of `PairLoss` over the scores [B, B] of a whole batch.

    Args:
        learned: 1/temperature [1]; for the sigmoid loss with the bias [2].
        duplicates: bool [B, B], other pairs that are no negatives.
    """
    positives = torch.eye(len(s_i2t), dtype=torch.bool, device=s_i2t.device)
    if duplicates is None:
        duplicates = positives
    duplicates = duplicates & ~positives
    logits = learned[0] * s_i2t, learned[0] * s_t2i.t()
    if len(learned) == 1:
        shares = [x.masked_fill(duplicates, -torch.inf).log_softmax(1).diagonal() for x in logits]
        return -(shares[0].mean() + shares[1].mean()) / 2
    sign = (positives | duplicates).to(s_i2t.dtype) * 2 - 1  # symmetric
    losses = [torch.nn.functional.logsigmoid(sign * (x + learned[1])).sum(1).mean() for x in logits]
    return -(losses[0] + losses[1]) / 2
