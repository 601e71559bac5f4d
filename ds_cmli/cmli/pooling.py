"""FLAIR's pair scores: each text pools each image's patches by attention (Xiao et al., 2025).

The method is that of arXiv 2412.03561, and of the authors' code: the text's class
token, layer-normalised, is the query of a multi-head attention over the layer-normalised patches
and an empty token, whose key and value are 0. The score is the cosine of what it pools with the
text. The scale and shift of a layer norm are those of the linear layer that follows it.

Neither attention weights, [R, T, heads, N], nor pooled embeddings, [R, T, H], are stored: the pairs
are computed in tiles, and again for backward. A tile needs of the output layer W, b only inner
products: with pooled values p, the embedding W p + b has the product (W^T w) . p + b . w with the
text w, and the squared length p^T W^T W p + 2 (W^T b) . p + b . b.

Shapes: R images and T texts that are compared, N patches, H width of the texts, D of the patches.
"""

import math
from collections.abc import Callable
from functools import partial
from operator import itemgetter
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ds_cmli.cmli.contrastive import SHORTEST, upcast
from ds_cmli.cmli.inputs import DEFAULT_SCRATCH_BYTES, check_shapes, full_precision

HEADS = 8  # as in the authors' code, where the width of the patches allows it
EPS = 1e-5  # of layer norms, for rows whose root mean square is 1

PooledScores = Callable[..., Tensor]  # `pooled_cosines` with its weights


class PoolingWeights(NamedTuple):
    """The linear layers of the attention."""

    query_weight: Tensor  # [D, H]
    query_bias: Tensor  # [D]
    context_weight: Tensor  # [2 D, D], of keys and of values
    context_bias: Tensor  # [2 D]
    out_weight: Tensor  # [H, D]
    out_bias: Tensor  # [H]


class TextConditionedPooling(nn.Module):
    """`pooled_cosines` with its learned weights, in 8 heads, or in fewer that divide D."""

    def __init__(self, text_width: int, patch_width: int):
        super().__init__()
        self.heads = math.gcd(HEADS, patch_width)
        for name, rows, columns in (
            ("query", patch_width, text_width),
            ("context", 2 * patch_width, patch_width),
            ("out", text_width, patch_width),
        ):
            weight = torch.empty(rows, columns)
            for part in weight.split(patch_width) if name == "context" else [weight]:
                nn.init.xavier_uniform_(part)
            setattr(self, f"{name}_weight", nn.Parameter(weight))
            setattr(self, f"{name}_bias", nn.Parameter(torch.zeros(rows)))

    def forward(
        self,
        patches: Tensor,
        texts: Tensor,
        patch_mask: Tensor | None = None,
        scratch_bytes: int = DEFAULT_SCRATCH_BYTES,
    ) -> Tensor:
        """Arguments and result as of `pooled_cosines`."""
        return pooled_cosines(patches, texts, self.weights, self.heads, patch_mask, scratch_bytes)

    @property
    def weights(self) -> PoolingWeights:
        return PoolingWeights(*map(self.get_parameter, PoolingWeights._fields))

    def fixed(self) -> PooledScores:
        """`forward` with the weights as they are now."""
        with torch.no_grad():
            weights = PoolingWeights(*map(torch.clone, self.weights))
        return partial(pooled_cosines, weights=weights, heads=self.heads)


class _Texts(NamedTuple):
    """What a tile needs of its texts w and of the output layer W, b."""

    query: Tensor  # [T, heads, D / heads], over the square root of the last size
    weight: Tensor  # [T, D], W^T w
    bias: Tensor  # [T], b . w

    def part(self, start: int, size: int) -> "_Texts":
        return _Texts(*map(itemgetter(slice(start, start + size)), self))


class _Layers(NamedTuple):
    """What is common to all tiles."""

    context_weight: Tensor
    context_bias: Tensor
    gram: Tensor  # [D, D], W^T W
    cross: Tensor  # [D], 2 W^T b
    square: Tensor  # b . b


def pooled_cosines(
    patches: Tensor,
    texts: Tensor,
    weights: PoolingWeights,
    heads: int,
    patch_mask: Tensor | None = None,
    scratch_bytes: int | None = DEFAULT_SCRATCH_BYTES,
) -> Tensor:
    """The cosine of each text with what it pools of each image's patches.

    Args:
        patches: [R, N, D] of unit length, of any float dtype.
        texts: [T, H], class tokens of unit length.
        weights: of any float dtype.
        heads: divides D.
        patch_mask: bool [R, N], the patches that there are; None: all. Others may have any finite
            value. An image without any pools the empty token alone.
        scratch_bytes: limit for what a tile holds at a time, which has at least one pair; None: all
            pairs are one tile, of any sizes.

    Returns:
        [R, T] fp32 (fp64 for fp64 patches). An embedding of length 0 has no direction and the score
        0, and gets no gradient.

    Raises:
        ValueError: on shapes that do not fit.
    """
    check_shapes(patches=(patches, "R N D"), texts=(texts, "T H"))
    if patch_mask is not None:
        check_shapes(patches=(patches, "R N D"), patch_mask=(patch_mask, "R N"))
    dtype = upcast(patches[:0]).dtype
    with full_precision(patches.device):
        query, query_bias, context, context_bias, out, out_bias = (
            x.to(patches.device, dtype) for x in weights
        )
        texts = texts.to(dtype)
        queries = F.linear(_normalised(texts), query, query_bias).unflatten(1, (heads, -1))
        sides = _Texts(queries / math.sqrt(queries.shape[2]), texts @ out, texts @ out_bias)
        layers = _Layers(
            context, context_bias, out.t() @ out, 2 * (out_bias @ out), out_bias @ out_bias
        )
        if scratch_bytes is None:
            return _tile(patches, patch_mask, sides, layers)
        images, columns = tile_shape(patches, len(texts), heads, scratch_bytes)
        rows = []
        for first in range(0, len(patches), images):
            part, mask = patches[first : first + images], None
            if patch_mask is not None:
                mask = patch_mask[first : first + images]
            row = []
            for start in range(0, len(texts), columns):
                tile = part, mask, sides.part(start, columns), layers
                row.append(checkpoint(_tile, *tile, use_reentrant=False, preserve_rng_state=False))
            rows.append(torch.cat(row, 1))
        return torch.cat(rows)


def tile_shape(patches: Tensor, texts: int, heads: int, scratch_bytes: int) -> tuple[int, int]:
    """The numbers of images and of texts of a tile: all texts, where they fit, as an image's keys
    and values are computed once in each tile."""
    _, N, D = patches.shape
    size = upcast(patches[:0]).dtype.itemsize
    # In backward: weights with their gradient before and after the softmax; pooled values with
    # theirs; patches, keys and values with theirs.
    pair = size * (3 * heads * (N + 1) + 6 * D)
    image = size * 12 * (N + 1) * D
    columns = min(texts, max(1, (scratch_bytes - image) // pair))
    return max(1, scratch_bytes // (image + columns * pair)), columns


def _normalised(x: Tensor) -> Tensor:
    """The layer norm of rows of unit length, without scale and shift."""
    width = x.shape[-1]
    return F.layer_norm(x, (width,), eps=EPS / width)


def _tile(patches: Tensor, mask: Tensor | None, texts: _Texts, layers: _Layers) -> Tensor:
    """The scores of a tile, [R, T]."""
    heads = texts.query.shape[1]
    x = _normalised(patches.to(layers.gram.dtype))
    context = F.linear(x, layers.context_weight, layers.context_bias)  # [R, N, 2 D]
    context = F.pad(context, (0, 0, 0, 1))  # the empty token
    keys, values = context.unflatten(2, (2, heads, -1)).permute(2, 0, 3, 1, 4)  # [R, heads, N + 1]
    logits = texts.query.transpose(0, 1) @ keys.transpose(2, 3)  # [R, heads, T, N + 1]
    if mask is not None:
        logits = logits.masked_fill(~F.pad(mask, (0, 1), value=True)[:, None, None], -torch.inf)
    pooled = (logits.softmax(3) @ values).transpose(1, 2).flatten(2)  # [R, T, D]
    dots = (pooled * texts.weight).sum(2) + texts.bias
    squares = ((pooled @ layers.gram + layers.cross) * pooled).sum(2) + layers.square
    return dots * F.threshold(squares, SHORTEST**2, math.inf).rsqrt()
