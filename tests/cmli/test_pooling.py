"""FLAIR's pair scores: by hand, against their formula in fp64 on random cases, and what they hold."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from ds_cmli.cmli.pooling import PoolingWeights, TextConditionedPooling, pooled_cosines, tile_shape
from tests.cmli.helpers import allocator_peak

F64 = torch.float64


def layer_norm(x):
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5 / x.shape[-1]).sqrt()


def formula(patches, texts, weights, heads, patch_mask):
    """The attention of each pair by itself, with the empty token, and the cosine of the output layer's result."""
    D, rows = patches.shape[2], []
    for i, image in enumerate(patches):
        context = layer_norm(image[patch_mask[i]]) @ weights.context_weight.t() + weights.context_bias
        context = torch.cat([context, context.new_zeros(1, 2 * D)])
        row = []
        for text in texts:
            query = layer_norm(text) @ weights.query_weight.t() + weights.query_bias
            parts = []
            for part in torch.arange(D).chunk(heads):
                logits = context[:, part] @ query[part] / math.sqrt(D // heads)
                parts.append(logits.softmax(0) @ context[:, D + part])
            out = weights.out_weight @ torch.cat(parts) + weights.out_bias
            row.append(out @ text / out.norm() if out.norm() > 1e-12 else 0 * out.sum())
        rows.append(torch.stack(row))
    return torch.stack(rows)


def case(number):
    """Inputs of random sizes, some with patches that there are not, or with none at all; and a limit of a tile."""
    generator = torch.Generator().manual_seed(number)

    def draw(*choices):
        return choices[int(torch.randint(len(choices), (1,), generator=generator))]

    R, N, T, H = draw(1, 2, 4), draw(1, 3, 7), draw(1, 3, 6), draw(1, 5, 12)
    D, heads = draw((8, 8), (6, 2), (4, 1), (16, 8), (3, 1))
    shapes = (D, H), (D,), (2 * D, D), (2 * D,), (H, D), (H,)
    weights = PoolingWeights(*(torch.randn(*shape, generator=generator, dtype=F64) for shape in shapes))
    if draw(False, False, True):
        weights = weights._replace(out_bias=torch.zeros(H, dtype=F64), context_bias=torch.zeros(2 * D, dtype=F64))
    patches = F.normalize(torch.randn(R, N, D, generator=generator, dtype=F64), dim=2)
    texts = F.normalize(torch.randn(T, H, generator=generator, dtype=F64), dim=1)
    mask = torch.rand(R, N, generator=generator) < draw(0.0, 0.5, 2.0)
    return patches, texts, weights, heads, mask, draw(1, 6000, 30_000, 1 << 26, None)


@pytest.mark.parametrize("numbers", [range(20), pytest.param(range(20, 320), marks=pytest.mark.slow)], ids=str)
def test_values_and_gradients_are_those_of_the_formula(numbers):
    for number in numbers:
        patches, texts, weights, heads, mask, limit = case(number)
        leaves = [x.requires_grad_() for x in (patches, texts, *weights)]
        scores = pooled_cosines(patches, texts, weights, heads, None if mask.all() else mask, limit)
        expected = formula(patches, texts, weights, heads, mask)
        assert_close(scores, expected, rtol=1e-9, atol=1e-9)
        upstream = torch.randn(scores.shape, dtype=F64)
        ours = torch.autograd.grad((scores * upstream).sum(), leaves)
        theirs = torch.autograd.grad((expected * upstream).sum(), leaves)
        for x, y in zip(ours, theirs, strict=True):
            assert_close(x, y, rtol=1e-7, atol=1e-7 * max(1.0, y.abs().max().item()), msg=f"case {number}")


@pytest.mark.parametrize("bias, expected", [([0.0, 0.0], -math.sqrt(0.5)), ([0.0, 1.0], 0.93851)])
def test_by_hand(bias, expected):
    # The norms are (1, -1) of the patch and (-1, 1) of the text: each of two heads has the logit -1, and weighs the
    # patch by 1 / (1 + e) = 0.26894. Without a bias (0.26894, -0.26894) is pooled, with it (0.26894, 0.73106).
    one, none = torch.eye(2), torch.zeros(2)
    weights = PoolingWeights(one, none, torch.cat([one, one]), torch.zeros(4), one, torch.tensor(bias))
    score = pooled_cosines(torch.tensor([[[1.0, 0.0]]]), torch.tensor([[0.0, 1.0]]), weights, 2)
    assert score.item() == pytest.approx(expected, rel=1e-4)


def test_an_image_without_patches_pools_nothing_and_gets_no_gradient():
    pooling = TextConditionedPooling(6, 16)
    patches, texts = torch.ones(1, 3, 16, requires_grad=True), F.normalize(torch.ones(2, 6), dim=1)
    scores = pooling(patches, texts, torch.zeros(1, 3, dtype=torch.bool))
    scores.sum().backward()
    assert (scores == 0).all() and (patches.grad == 0).all()
    assert all(p.grad.isfinite().all() for p in pooling.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_are_computed_in_fp32_also_under_autocast(dtype):
    patches, texts, weights, heads, *_ = case(5)
    narrow = patches.to(dtype), texts.to(dtype), PoolingWeights(*(x.to(dtype) for x in weights))
    expected = pooled_cosines(*(x.float() for x in narrow[:2]), PoolingWeights(*(x.float() for x in narrow[2])), heads)
    assert torch.equal(pooled_cosines(*narrow, heads), expected) and expected.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(pooled_cosines(*narrow, heads), expected)


def test_shapes_that_do_not_fit():
    pooling = TextConditionedPooling(6, 16)
    with pytest.raises(ValueError, match=r"patch_mask"):
        pooling(torch.ones(2, 3, 16), torch.ones(2, 6), torch.ones(3, 3, dtype=torch.bool))


@pytest.mark.parametrize("limit", [1 << 19, 1 << 21])
def test_a_tile_holds_no_more_than_its_limit(limit):
    R, N, T, H, D = 6, 49, 40, 48, 64
    pooling = TextConditionedPooling(H, D)
    patches = F.normalize(torch.randn(R, N, D), dim=2).requires_grad_()
    texts = F.normalize(torch.randn(T, H), dim=1).requires_grad_()
    images, columns = tile_shape(patches, T, 8, limit)
    assert images * columns < R * T  # several tiles

    def step():
        pooling(patches, texts, None, limit).sum().backward()

    step()
    # What is not of a tile: the patches' gradient in tiles and whole, and what is known of the texts and the layers.
    outside = 4 * (2 * R * N * D + 8 * T * (D + H) + 8 * D * (2 * D + H))
    peak = allocator_peak(step)
    print(f"{peak:,} B, of them at most {outside:,} B outside of tiles of {limit:,} B")
    assert peak <= limit + outside
