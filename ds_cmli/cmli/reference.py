"""The oracle: CMLI written out over the whole similarity tensor, a few lines to be checked by eye.

Every implementation is tested against this one.

Shapes: I images, J texts, N patches, M text positions (padded), D features.
"""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


def cmli_scores_reference(
    image: Tensor, text: Tensor, token_mask: Tensor, patch_mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return what `cmli_scores` does by plain autograd, for small inputs: equations (1) to (4)."""
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

    # `max(dim)` takes the lowest index of equals; `amax` would divide the gradient among them.
    best_token = S.masked_fill(~token[:, :, None, :], -torch.inf).max(3).values  # [I, J, N]
    s_i2t = torch.where(patch, best_token, 0).sum(2) / patch.sum(2).clamp(min=1)

    best_patch = S.masked_fill(~patch[..., None], -torch.inf).max(2).values  # [I, J, M]
    s_t2i = torch.where(token, best_patch, 0).sum(2) / token.sum(2).clamp(min=1)

    is_empty = ~(patch.any(2) & token.any(2))  # an image without patches, a text without tokens
    return s_i2t.masked_fill(is_empty, 0), s_t2i.masked_fill(is_empty, 0)


def pair_loss_reference(
    s_i2t: Tensor, s_t2i: Tensor, scale_and_bias: Tensor, duplicates: Tensor | None = None
) -> Tensor:
    """Return the loss of `PairLoss` over the scores [B, B] of a whole batch.

    Args:
        scale_and_bias: 1/temperature [1]; for the sigmoid loss with the bias [2].
        duplicates: bool [B, B], other pairs that are not negatives.
    """
    positives = torch.eye(len(s_i2t), dtype=torch.bool, device=s_i2t.device)
    if duplicates is None:
        duplicates = positives
    duplicates = duplicates & ~positives
    scale, *bias = scale_and_bias
    sign = (positives | duplicates).to(s_i2t.dtype) * 2 - 1  # symmetric
    losses = []
    for logits in (scale * s_i2t, scale * s_t2i.t()):
        if bias:
            losses.append(-logsigmoid(sign * (logits + bias[0])).sum(1).mean())
        else:
            log_softmax = logits.masked_fill(duplicates, -torch.inf).log_softmax(1)
            losses.append(-log_softmax.diagonal().mean())
    return torch.stack(losses).mean()
