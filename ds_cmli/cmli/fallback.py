"""All-pairs CMLI in plain PyTorch, for what has no kernels: fp64, older GPUs, no compiler.

A tile of similarities exists at a time. Backward multiplies a tile of coefficients, made from the
argmax indices, with the features of each side. Nothing is added atomically: the same input gives
the same bits.

Shapes: I images, J texts, N patches, M text positions (padded), D features; of a tile i, j, m.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from .sides import Sides, TensorPair, has_data, slices, upcast


def _groups(token_mask: Tensor) -> Iterator[tuple[Tensor, int, bool]]:
    """Yields texts of similar length, the longest, and whether all their positions are valid."""
    M = token_mask.shape[1]
    ends = (token_mask * torch.arange(1, M + 1, device=token_mask.device)).amax(1)
    counts = torch.stack([ends, token_mask.sum(1)], 1)
    for texts in ends.argsort(stable=True).split(8 if token_mask.device.type == "cpu" else 32):
        last, fewest = counts[texts, 0].amax(), counts[texts, 1].amin()
        longest, full = M, False
        if has_data(token_mask):
            longest, full = int(last), int(fewest) == int(last)  # CPU-GPU sync
        if longest:
            yield texts, longest, full


def _images(I: int, each: int, device: torch.device) -> list[slice]:  # noqa: E741
    """Those of a tile, each of which has so many similarities."""
    return slices(I, max(1, 2 ** (19 if device.type == "cpu" else 24) // each))


def _valid(x: Tensor, mask: Tensor | None) -> Tensor:
    """Upcast features, zeros where they are masked: these may hold anything, NaN included."""
    return upcast(x) if mask is None else upcast(x).masked_fill(~mask[..., None], 0)


def _first_maxima(S: Tensor, dim: int, equal: Tensor | None) -> TensorPair:
    """The maxima, and with a buffer like S their lowest indices: what equals the maximum, times the
    distance from the end, is largest at the first. Three times faster than `max`."""
    best = S.amax(dim, keepdim=True)
    if equal is None:
        return best.squeeze(dim), best
    length = S.shape[dim]
    distance = torch.arange(length, 0, -1, dtype=S.dtype, device=S.device)
    torch.eq(S, best, out=equal).mul_(distance.view(-1, *[1] * (S.ndim - 1 - dim)))
    return best.squeeze(dim), length - equal.amax(dim).clamp_(min=1)  # no NaN equals any


def forward(sides: Sides, scores: TensorPair, argmax: TensorPair | None) -> None:
    """Write scores [I, J], zeros before, and argmax indices [I, J, N] and [I, J, M]."""
    image, text, token_mask, patch_mask = sides
    (I, N, _), device = image.shape, image.device  # noqa: E741
    counts = torch.full((I,), N, device=device) if patch_mask is None else patch_mask.sum(1)
    for j, m, full in _groups(token_mask):
        token = token_mask[j, :m]
        w = _valid(text[j, :m], token).flatten(0, 1)
        for i in _images(I, N * len(w), device):
            patch = None if patch_mask is None else patch_mask[i]
            S = (w @ _valid(image[i], patch).flatten(0, 1).t()).view(len(j), m, -1, N)
            if not full:
                S.masked_fill_(~token[:, :, None, None], -torch.inf)
            equal = None if argmax is None else torch.empty_like(S)
            best_token, which_token = _first_maxima(S, 1, equal)  # [j, i, N]
            if patch is not None:
                S.masked_fill_(~patch, -torch.inf)
                best_token.masked_fill_(~patch, 0)
            best_patch, which_patch = _first_maxima(S, 3, equal)  # [j, m, i]
            best_patch.masked_fill_(~token[:, :, None], 0)
            some = token.any(1)[:, None] & (counts[i] > 0)  # [j, i]
            means = best_token.sum(2) / counts[i], best_patch.sum(1) / token.sum(1)[:, None]
            for out, mean in zip(scores, means, strict=True):
                out[i, j] = torch.where(some, mean, 0).t()
            if argmax is not None:
                argmax[0][i, j] = which_token.transpose(0, 1).to(argmax[0].dtype)
                argmax[1][i, j, :m] = which_patch.permute(2, 0, 1).to(argmax[1].dtype)


def backward(sides: Sides, grads: TensorPair, argmax: TensorPair, d_sides: TensorPair) -> None:
    """Add the gradients of image and text to those given, fp32 or fp64."""
    image, text, token_mask, patch_mask = sides
    d_image, d_text = d_sides
    I, N, _ = image.shape  # noqa: E741
    weights = d_image.new_ones(I, N) if patch_mask is None else patch_mask.to(d_image.dtype)
    weights = weights / weights.sum(1, keepdim=True).clamp(min=1)
    for j, m, _ in _groups(token_mask):
        token = token_mask[j, :m]
        w, of_token = _valid(text[j, :m], token).flatten(0, 1), token.to(d_text.dtype)
        of_token = of_token / of_token.sum(1, keepdim=True).clamp(min=1)  # [j, m]
        d_w = torch.zeros_like(w)
        for i in _images(I, N * len(w), image.device):
            patch = None if patch_mask is None else patch_mask[i]
            v = _valid(image[i], patch).flatten(0, 1)
            some = token.any(1)[:, None] & (weights[i] > 0).any(1)  # [j, i]
            i2t, t2i = (torch.where(some, g[i, j].t(), 0)[:, None, :, None] for g in grads)
            C = w.new_zeros(len(j), m, len(v) // N, N)
            which = argmax[0][i, j].transpose(0, 1)[:, None].long()  # [j, 1, i, N]
            C.scatter_(1, which, i2t * weights[i])
            which = argmax[1][i, j, :m].permute(1, 2, 0)[..., None].long()  # [j, m, i, 1]
            C.scatter_(3, which, C.gather(3, which) + t2i * of_token[:, :, None, None])
            C = C.flatten(2).flatten(0, 1)  # [j m, i N]
            d_image[i].flatten(0, 1).addmm_(C.t(), w)
            d_w.addmm_(C, v)
        # A NaN of the other side is one times a coefficient of 0 too.
        d_text[j, :m] += d_w.unflatten(0, (len(j), m)).masked_fill_(~token[..., None], 0)
    if patch_mask is not None:
        d_image.masked_fill_(~patch_mask[..., None], 0)
