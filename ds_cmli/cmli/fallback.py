"""All-pairs CMLI in plain PyTorch, where there are no kernels: fp64, older GPUs, no compiler.

One tile of similarities exists at a time. Backward multiplies a tile of coefficients, made from the
argmax indices, with the features of each side. Nothing is added atomically: the same input gives
the same bits.

Shapes: I images, J texts, N patches, M text positions (padded), D features; of a tile i, j, m.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from .sides import Directions, SidePair, Sides, has_data, slices, upcast


def text_groups(token_mask: Tensor) -> Iterator[tuple[Tensor, int, bool]]:
    """Yield the texts that have valid tokens, in groups of similar length. CPU-GPU syncs.

    With a group's numbers [j] come the positions m up to its last valid one, and whether all these
    are valid.
    """
    M = token_mask.shape[1]
    ends = (token_mask * torch.arange(1, M + 1, device=token_mask.device)).amax(1)
    counts = token_mask.sum(1)
    for texts in ends.argsort(stable=True).split(8 if token_mask.device.type == "cpu" else 32):
        longest = M
        are_full = False
        if has_data(token_mask):
            longest, fewest = torch.stack([ends[texts].amax(), counts[texts].amin()]).tolist()
            are_full = fewest == longest
        if longest:
            yield texts, longest, are_full


def image_tiles(num_images: int, similarities: int, device: torch.device) -> list[slice]:
    max_similarities = 2**19 if device.type == "cpu" else 2**24
    return slices(num_images, max(1, max_similarities // similarities))


def valid_features(x: Tensor, mask: Tensor | None) -> Tensor:
    """Upcast features, with zeros where they are masked: these may hold anything, NaN included."""
    return upcast(x) if mask is None else upcast(x).masked_fill(~mask[..., None], 0)


def first_maxima(S: Tensor, dim: int, scratch: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the maxima and, given scratch like S, the lowest indices of each.

    Where S equals its maximum, the distance from the end is largest at the lowest index. This is
    three times faster than `max`.
    """
    best = S.amax(dim, keepdim=True)
    if scratch is None:
        return best.squeeze(dim), best
    length = S.shape[dim]
    distance = torch.arange(length, 0, -1, dtype=S.dtype, device=S.device)
    torch.eq(S, best, out=scratch).mul_(distance.view(-1, *[1] * (S.ndim - 1 - dim)))
    # Nothing equals a NaN: without the minimum of 1, its index would be beyond the end.
    return best.squeeze(dim), length - scratch.amax(dim).clamp_(min=1)


def forward(sides: Sides, scores: Directions, argmax: Directions | None) -> None:
    image, text, token_mask, patch_mask = sides
    s_i2t, s_t2i = scores
    I, N, _ = image.shape  # noqa: E741
    device = image.device
    num_patches = torch.full((I,), N, device=device) if patch_mask is None else patch_mask.sum(1)
    for j, m, are_full in text_groups(token_mask):
        token = token_mask[j, :m]
        w = valid_features(text[j, :m], token).flatten(0, 1)
        for i in image_tiles(I, N * len(w), device):
            patch = None if patch_mask is None else patch_mask[i]
            S = w @ valid_features(image[i], patch).flatten(0, 1).t()
            S = S.view(len(j), m, -1, N)
            if not are_full:
                S.masked_fill_(~token[:, :, None, None], -torch.inf)
            scratch = None if argmax is None else torch.empty_like(S)
            best_token, token_index = first_maxima(S, 1, scratch)  # [j, i, N]
            if patch is not None:
                S.masked_fill_(~patch, -torch.inf)
                best_token.masked_fill_(~patch, 0)
            best_patch, patch_index = first_maxima(S, 3, scratch)  # [j, m, i]
            best_patch.masked_fill_(~token[:, :, None], 0)
            is_pair = token.any(1)[:, None] & (num_patches[i] > 0)  # [j, i], neither is empty
            i2t = best_token.sum(2) / num_patches[i]
            t2i = best_patch.sum(1) / token.sum(1)[:, None]
            s_i2t[i, j] = torch.where(is_pair, i2t, 0).t()
            s_t2i[i, j] = torch.where(is_pair, t2i, 0).t()
            if argmax is not None:
                token_argmax, patch_argmax = argmax
                token_argmax[i, j] = token_index.transpose(0, 1).to(token_argmax.dtype)
                patch_argmax[i, j, :m] = patch_index.permute(2, 0, 1).to(patch_argmax.dtype)


def backward(sides: Sides, d_scores: Directions, argmax: Directions, d_sides: SidePair) -> None:
    image, text, token_mask, patch_mask = sides
    d_image, d_text = d_sides
    d_i2t, d_t2i = d_scores
    token_argmax, patch_argmax = argmax
    I, N, _ = image.shape  # noqa: E741
    patch_weight = d_image.new_ones(I, N) if patch_mask is None else patch_mask.to(d_image.dtype)
    patch_weight = patch_weight / patch_weight.sum(1, keepdim=True).clamp(min=1)  # of a mean
    for j, m, _ in text_groups(token_mask):
        token = token_mask[j, :m]
        w = valid_features(text[j, :m], token).flatten(0, 1)
        token_weight = token.to(d_text.dtype)
        token_weight = token_weight / token_weight.sum(1, keepdim=True).clamp(min=1)  # [j, m]
        d_w = torch.zeros_like(w)
        for i in image_tiles(I, N * len(w), image.device):
            patch = None if patch_mask is None else patch_mask[i]
            v = valid_features(image[i], patch).flatten(0, 1)
            is_pair = token.any(1)[:, None] & (patch_weight[i] > 0).any(1)  # [j, i]
            i2t = torch.where(is_pair, d_i2t[i, j].t(), 0)[:, None, :, None]  # [j, 1, i, 1]
            t2i = torch.where(is_pair, d_t2i[i, j].t(), 0)[:, None, :, None]
            C = w.new_zeros(len(j), m, len(v) // N, N)
            token_index = token_argmax[i, j].transpose(0, 1)[:, None].long()  # [j, 1, i, N]
            C.scatter_(1, token_index, i2t * patch_weight[i])
            patch_index = patch_argmax[i, j, :m].permute(1, 2, 0)[..., None].long()  # [j, m, i, 1]
            C.scatter_(
                3, patch_index, C.gather(3, patch_index) + t2i * token_weight[:, :, None, None]
            )
            C = C.flatten(2).flatten(0, 1)  # [j m, i N]
            d_image[i].flatten(0, 1).addmm_(C.t(), w)
            d_w.addmm_(C, v)
        # A coefficient of 0 times a NaN of the other side is NaN.
        d_text[j, :m] += d_w.unflatten(0, (len(j), m)).masked_fill_(~token[..., None], 0)
    if patch_mask is not None:
        d_image.masked_fill_(~patch_mask[..., None], 0)
