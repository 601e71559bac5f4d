"""Other implementations of the all-pairs scores, which ours is measured beside: never imported by training.

Each takes image [I, N, D], text [J, M, D] and the text's mask, bool [J, M], and returns s_i2t and s_t2i [I, J].
Libraries that know one direction are called in both; they come with `pip install -e '.[bench]'`.
"""

import torch
from torch import Tensor


def naive(image: Tensor, text: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The fastest materialised form: one product, and `max`, whose backward is cheaper than that of `amax`."""
    S = (image.flatten(0, 1) @ text.flatten(0, 1).t()).view(*image.shape[:2], *text.shape[:2])  # [I, N, J, M]
    s_i2t = S.masked_fill(~mask, -torch.inf).max(3).values.mean(1)
    return s_i2t, (S.max(1).values * mask).sum(2) / mask.sum(1)


def x_clip(image: Tensor, text: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The formula of x-clip 0.14.4, use_all_token_embeds."""
    S = torch.einsum("xtd,yid->xyti", text, image)
    token = mask[:, None, :]
    t2i = S.amax(-1).masked_fill(~token, 0.0).sum(-1) / token.sum(-1).clamp(min=1e-6)
    i2t = S.masked_fill(~token[..., None], -torch.finfo(S.dtype).max).amax(-2).mean(-1)
    return i2t.t(), t2i.t()


def sentence_transformers(image: Tensor, text: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    from sentence_transformers.util import maxsim

    return maxsim(image, text, b_mask=mask) / image.shape[1], maxsim(text, image, a_mask=mask).t() / mask.sum(1)


def late_interaction_kernels(image: Tensor, text: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    from late_interaction_kernels import maxsim

    return maxsim(image, text, d_mask=mask) / image.shape[1], maxsim(text, image, q_mask=mask).t() / mask.sum(1)


def flash_maxsim(image: Tensor, text: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    from flash_maxsim import flash_maxsim_batched_train as maxsim

    lengths = mask.sum(1).to(torch.int32)
    s_i2t = maxsim(image, text, doc_lengths=lengths) / image.shape[1]
    return s_i2t, maxsim(text, image, query_lengths=lengths).t() / lengths
