"""SPARC's fine-grained loss: hand-computed values, masks, gradients, and a training with it."""

import math

import pytest
import torch
from torch.testing import assert_close

from ds_cmli.config.registry import LOSSES, load
from ds_cmli.config.schema import LossConfig
from ds_cmli.losses.sparc import alignment_weights, sparc_loss

F64 = torch.float64
SCALE = torch.tensor([math.log(2.0)])
PATCHES = torch.tensor([[[4.0, 0.0], [0.0, 4.0], [2.0, 2.0], [0.8, 1.0]]])
TOKENS = torch.tensor([[[1.0, 0.0], [0.0, 3.0]]])
BOTH = torch.tensor([[True, True]])


def inputs(dtype=F64):
    """Three texts of 4, 2 and 1 valid tokens, not all at the start, against 5 patches each."""
    generator = torch.Generator().manual_seed(0)
    patches = torch.randn(3, 5, 4, dtype=dtype, generator=generator)
    tokens = torch.randn(3, 6, 4, dtype=dtype, generator=generator)
    mask = torch.tensor([[0, 1, 1, 1, 1, 0], [0, 1, 0, 1, 0, 0], [0, 0, 1, 0, 0, 0]]).bool()
    return patches, tokens, mask


def test_weights_by_hand():
    # Similarities of the first token 4, 0, 2, 0.8: scaled 1, 0, 1/2, 1/5, the last below 1/4. Of the second, three
    # times 0, 4, 2, 1: scaled 0, 1, 1/2, 1/4, the last not below 1/4.
    expected = torch.tensor([[[2 / 3, 0, 1 / 3, 0], [0, 4 / 7, 2 / 7, 1 / 7]]])
    assert_close(alignment_weights(PATCHES, TOKENS), expected)


def test_by_hand():
    # The grouped embeddings are (10/3, 2/3) and (4.8/7, 3). Cosines with the tokens (1, 0) and (0, 1):
    # [[0.98058068, 0.19611614], [0.22282480, 0.97485851]]; logits are twice that. Each loss is softplus(other - own):
    # of the rows 0.18918801 and 0.20067251, of the columns 0.19860142 and 0.19117003.
    expected = (0.18918801 + 0.20067251 + 0.19860142 + 0.19117003) / 4
    assert_close(sparc_loss(PATCHES, TOKENS, BOTH, SCALE).item(), expected, rtol=1e-6, atol=0)


def test_each_text_weighs_the_same():
    patches, tokens, mask = inputs()
    results = []
    for b in range(3):
        valid = tokens[b : b + 1, mask[b]]
        results.append(sparc_loss(patches[b : b + 1], valid, torch.ones(1, valid.shape[1]).bool(), SCALE))
    assert results[0] > 0 and results[1] > 0 and results[2] == 0
    assert_close(sparc_loss(patches, tokens, mask, SCALE), torch.stack(results).mean())


@pytest.mark.parametrize("padding", [1e6, torch.nan, torch.inf])
def test_padding_takes_part_in_nothing(padding):
    patches, tokens, mask = inputs()
    other = tokens.masked_fill(~mask[:, :, None], padding).requires_grad_()
    outcome = sparc_loss(patches, other, mask, SCALE)
    assert_close(outcome, sparc_loss(patches, tokens, mask, SCALE), rtol=0, atol=0)
    outcome.backward()
    assert other.grad.isfinite().all() and (other.grad[~mask] == 0).all() and (other.grad[mask][:6] != 0).any(1).all()


@pytest.mark.parametrize("valid", [0, 1])
def test_a_text_without_negatives_gives_zero(valid):
    patches, tokens, _ = inputs(torch.float32)
    mask = torch.arange(6).expand(3, 6) < valid
    given = patches.requires_grad_(), tokens.requires_grad_(), SCALE.clone().requires_grad_()
    loss = sparc_loss(given[0], given[1], mask, given[2])
    loss.backward()
    assert loss == 0 and all((x.grad == 0).all() for x in given)


@pytest.mark.parametrize("patches", [1, 5])
@pytest.mark.parametrize("value", [0.0, 0.3])
def test_patches_that_are_all_alike_weigh_the_same(patches, value):
    alike = torch.full((3, patches, 4), value, requires_grad=True)
    _, tokens, mask = inputs(torch.float32)
    tokens.requires_grad_()
    assert_close(alignment_weights(alike, tokens), torch.full((3, 6, patches), 1 / patches))
    loss = sparc_loss(alike, tokens, mask, SCALE)
    loss.backward()
    assert loss.isfinite() and alike.grad.isfinite().all() and tokens.grad.isfinite().all()


def test_gradients():
    patches, tokens, mask = inputs()
    # gradcheck moves each input by 1e-6: nothing may come from one side of the threshold, 1/5, to the other.
    similarity = tokens @ patches.mT
    scaled = similarity - similarity.amin(2, keepdim=True)
    scaled /= scaled.amax(2, keepdim=True)
    assert (scaled[mask] - 1 / 5).abs().min() > 1e-3
    given = patches.requires_grad_(), tokens.requires_grad_(), SCALE.to(F64).requires_grad_()
    assert torch.autograd.gradcheck(lambda *x: sparc_loss(x[0], x[1], mask, x[2]), given)


def test_tokens_and_patches_learn_to_find_each_other():
    patches, tokens, mask = inputs()
    given = patches.requires_grad_(), tokens.requires_grad_(), SCALE.to(F64).requires_grad_()
    optimizer = torch.optim.Adam(given, 0.05)
    before = sparc_loss(patches, tokens, mask, given[2]).item()
    for _ in range(100):
        optimizer.zero_grad()
        loss = sparc_loss(patches, tokens, mask, given[2])
        loss.backward()
        optimizer.step()
    assert loss < before / 10 and given[2] > SCALE  # the temperature falls, too


def test_a_token_of_zeros_learns_nothing():
    torch.manual_seed(0)
    patches, tokens = torch.randn(2, 5, 8), torch.randn(2, 4, 8)
    tokens[1, 2] = 0.0
    tokens.requires_grad_()
    sparc_loss(patches, tokens, torch.ones(2, 4, dtype=torch.bool), torch.zeros(1)).backward()
    assert tokens.grad.isfinite().all() and tokens.grad.abs().max() < 10


def test_features_of_16_bits_are_compared_in_fp32():
    patches, tokens, mask = inputs(torch.bfloat16)
    outcome = sparc_loss(patches, tokens, mask, SCALE)
    assert outcome.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        again = sparc_loss(patches.float(), tokens.float(), mask, SCALE)
    assert_close(again, outcome, rtol=0, atol=0)


def test_shapes_that_do_not_fit_are_refused():
    patches, tokens, mask = inputs()
    with pytest.raises(ValueError, match="1 texts are no multiple of 3 images"):
        sparc_loss(patches, tokens[:1], mask[:1], SCALE)
    with pytest.raises(ValueError, match=r"token_mask has shape \[3, 1\], \[C, M\]: M is 1, but 6 in tokens"):
        sparc_loss(patches, tokens, mask[:, :1], SCALE)


def test_it_has_a_temperature_and_needs_no_other_pairs():
    loss = load(LOSSES["sparc"])(LossConfig())
    assert [name for name, _ in loss.named_parameters()] == ["logit_scale"]
    assert not LOSSES["sparc"].scores and not LOSSES["sparc"].teacher
