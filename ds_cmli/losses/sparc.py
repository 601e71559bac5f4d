"""SPARC's fine-grained loss: each token against the patches that it groups (Bica et al., 2024).

Shapes: B images, C texts, N patches, M text positions, D embedding dimension.
"""

import torch
from torch import Tensor

from ds_cmli.cmli.contrastive import temperature_scale, unit_rows, upcast
from ds_cmli.cmli.inputs import check_shapes, full_precision
from ds_cmli.config.schema import LossConfig
from ds_cmli.losses.base import Loss, log_scale
from ds_cmli.losses.functions import masked_mean
from ds_cmli.losses.inputs import LossInputs
from ds_cmli.losses.own_texts import by_image


class Sparc(Loss):
    # The paper learns the temperature and does not say where it starts; the scores are cosines, as
    # those of the global loss, and start at its temperature.
    init_temperature = 0.07

    def __init__(self, config: LossConfig):
        super().__init__(config)
        self.logit_scale = log_scale(self.init_temperature)

    def forward(self, inputs: LossInputs) -> Tensor:
        project = inputs.student.projection
        patches = project(inputs.features.patches)  # [B, N, D]
        tokens = project(inputs.features.tokens)  # [C, M, D]
        return sparc_loss(patches, tokens, inputs.batch.token_mask, self.logit_scale)


def alignment_weights(patches: Tensor, tokens: Tensor) -> Tensor:
    """SPARC's weights of the patches for each token: equations (2) to (4) of Bica et al., 2024.

    Inner products, scaled to [0, 1] over the patches of an image, set to 0 below 1/N and divided by
    their sum (arXiv 2401.09865, listing 1). Gradients pass through all of it, minimum and maximum
    included. Where all patches are equally similar, (2) is 0/0: there each has the weight 1/N.

    Args:
        patches: [B, N, D] fp32 or fp64, not normalised: their norms count.
        tokens: [B, M, D], the same dtype; their norms have no effect.

    Returns:
        [B, M, N], at least 0; each row's sum is 1.
    """
    similarity = tokens @ patches.transpose(1, 2)  # [B, M, N]
    lowest, highest = similarity.amin(2, keepdim=True), similarity.amax(2, keepdim=True)
    spread = highest - lowest  # [B, M, 1]
    # Equal but for rounding, which (2) would scale to [0, 1].
    rounding = torch.finfo(spread.dtype).eps * torch.maximum(lowest.abs(), highest.abs())
    equal = spread <= rounding
    scaled = (similarity - lowest) / spread.masked_fill(equal, 1.0)  # (2)
    kept = scaled.masked_fill(scaled < 1 / patches.shape[1], 0.0)  # (3)
    kept = kept.masked_fill(equal, 1.0)
    return kept / kept.sum(2, keepdim=True)  # (4)


def sparc_loss(patches: Tensor, tokens: Tensor, token_mask: Tensor, logit_scale: Tensor) -> Tensor:
    """SPARC's fine-grained loss: equations (2) to (6) of Bica et al., 2024 (arXiv 2401.09865).

    The patches that a token selects, weighted by `alignment_weights`, are its grouped embedding. By
    cosine similarity each grouped embedding is to find its token among the valid tokens of the same
    text, and each token its grouped embedding. The mean of both directions is averaged over the
    valid tokens of each text, as in (6); listing 1 averages over those of all texts.

    Args:
        patches: [B, N, D], projected; of any float dtype, not normalised.
        tokens: [C, M, D], projected into the same space.
        token_mask: bool [C, M], True = valid (not [CLS], [SEP], [PAD]); the other tokens may have
            any value.
        logit_scale: one element, ln(1/temperature).

    Returns:
        A scalar, the mean over texts. A text of one valid token, or of none, gives 0.

    Raises:
        ValueError: on shapes that do not fit.
    """
    check_shapes(
        patches=(patches, "B N D"), tokens=(tokens, "C M D"), token_mask=(token_mask, "C M")
    )
    with full_precision(tokens.device):
        patches = upcast(patches)
        tokens = upcast(tokens).masked_fill(~token_mask[:, :, None], 0.0)
        weights = alignment_weights(patches, by_image(tokens, len(patches)))
        groups = (weights @ patches).view_as(tokens)  # (5), [C, M, D]
        cosines = unit_rows(groups) @ unit_rows(tokens).transpose(1, 2)
        logits = temperature_scale(logit_scale) * cosines  # [C, M, M], groups against tokens
    # A position that is not valid is compared with itself alone, which is finite and gives 0.
    compared = token_mask[:, :, None] & token_mask[:, None, :]
    compared |= torch.eye(token_mask.shape[1], dtype=torch.bool, device=token_mask.device)
    logits = logits.masked_fill(~compared, -torch.inf)
    both = (logits.logsumexp(2) + logits.logsumexp(1)) / 2  # [C, M]
    return masked_mean(both - logits.diagonal(dim1=1, dim2=2), token_mask)  # (6)
