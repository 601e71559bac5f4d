"""What `speed/cmli.py` compares the all-pairs scores with; training never imports it.

Inputs in the document's sizes, a timed step over them with the bare matrix product as floor, and
other implementations of the scores: `broadcast` stores every product of every dot product,
`materialised` lets a matrix product store one number for each. Each of these takes image [I, N, D],
text [J, M, D] and the text's mask, bool [J, M], and returns s_i2t and s_t2i [I, J].
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ds_cmli.cmli.contrastive import upcast

N, M, D = 196, 64, 256
SETTINGS = ("full", "captions", "mixed")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
Scores = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def text_lengths(setting: str, B: int) -> Tensor:
    """Valid tokens of each text: all 62; as in captions (mean about 12); evenly from 8 to 62."""
    g = torch.Generator().manual_seed(1)
    if setting == "full":
        return torch.full((B,), 62)
    if setting == "mixed":
        return torch.randint(8, 63, (B,), generator=g)
    lengths = torch.empty(B).log_normal_(2.35, 0.5, generator=g).round().clamp(3, 62).long()
    lengths[0] = 62
    return lengths


class Problem:
    """Inputs, upstream gradients and what is timed: I images against J texts."""

    def __init__(self, setting: str, I: int, J: int, dtype: torch.dtype, device: str):  # noqa: E741
        g = torch.Generator().manual_seed(0)
        lengths = text_lengths(setting, J)
        self.tokens = int(lengths.sum())
        self.mask = (torch.arange(M) < lengths[:, None]).to(device)
        self.image, self.text = (
            F.normalize(torch.randn(n, p, D, generator=g), dim=-1).to(device, dtype)
            for n, p in ((I, N), (J, M))
        )
        self.image.requires_grad_(), self.text.requires_grad_()
        self.grads = [(torch.randn(I, J, generator=g) / J).to(device) for _ in range(2)]

    def forward(self, scores: Scores) -> None:
        with torch.no_grad():
            scores(self.image, self.text, self.mask)

    def step(self, scores: Scores) -> None:
        out = scores(self.image, self.text, self.mask)
        torch.autograd.grad(out, (self.image, self.text), self.grads)

    def floor(self) -> Callable[[], None]:
        valid = self.text.detach()[self.mask].float()
        patches = self.image.detach().float().flatten(0, 1)
        out = valid.new_empty(len(valid), 16 * N)

        def product() -> None:
            for block in patches.split(16 * N):
                scores = out.view(-1)[: len(valid) * len(block)].view(len(valid), len(block))
                torch.mm(valid, block.t(), out=scores)

        return product


def broadcast_dots(x: Tensor, y: Tensor) -> Tensor:
    """Dot products over the last dimension of broadcast tensors, with every product stored."""
    return (x * y).sum(-1)


def cmli_from(similarities: Tensor, token_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Both scores [I, G] from [I, N, G, M], masked tokens at minus infinity."""
    s_i2t = similarities.max(3).values.mean(1)
    best = similarities.max(1).values.masked_fill(~token_mask, 0)  # [I, G, M]
    return s_i2t, best.sum(2) / token_mask.sum(1)


def broadcast_scores(
    image: Tensor, text: Tensor, token_mask: Tensor, image_mask: None = None
) -> tuple[Tensor, Tensor]:
    """CMLI of all pairs as the document counts it: [I, N, G, M, D] is stored.

    Arguments as `cmli_scores`.
    """
    similarities = broadcast_dots(upcast(image)[:, :, None, None], upcast(text))
    return cmli_from(similarities.masked_fill_(~token_mask, -torch.inf), token_mask)


def materialised_scores(
    image: Tensor, text: Tensor, token_mask: Tensor, image_mask: None = None, narrow: bool = False
) -> tuple[Tensor, Tensor]:
    """CMLI of all pairs by one matrix product, all similarities stored: [I, N, G, M].

    Arguments as `cmli_scores`.

    Plain autograd. `narrow` stores 16-bit inputs' similarities in 16 bits and lets rounding decide
    between maxima.
    """
    if not narrow:
        image, text = upcast(image), upcast(text)
    similarities = image.flatten(0, 1) @ text.flatten(0, 1).t()  # [I*N, G*M]
    # In place and before the view: a copy of this tensor is what nobody can afford.
    similarities.masked_fill_(~token_mask.flatten(), -torch.inf)
    s_i2t, s_t2i = cmli_from(similarities.view(*image.shape[:2], *text.shape[:2]), token_mask)
    return upcast(s_i2t), upcast(s_t2i)


def naive(image: Tensor, text: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The fastest materialised form: one product, and `max`, whose backward is cheap."""
    # [I, N, J, M].
    S = (image.flatten(0, 1) @ text.flatten(0, 1).t()).view(*image.shape[:2], *text.shape[:2])
    s_i2t = S.masked_fill(~mask, -torch.inf).max(3).values.mean(1)
    return s_i2t, (S.max(1).values * mask).sum(2) / mask.sum(1)


def x_clip(image: Tensor, text: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The formula of x-clip 0.14.4, use_all_token_embeds."""
    S = torch.einsum("xtd,yid->xyti", text, image)
    token = mask[:, None, :]
    t2i = S.amax(-1).masked_fill(~token, 0.0).sum(-1) / token.sum(-1).clamp(min=1e-6)
    i2t = S.masked_fill(~token[..., None], -torch.finfo(S.dtype).max).amax(-2).mean(-1)
    return i2t.t(), t2i.t()
