"""The sigmoid losses: hand-computed values, and blocks of ranks against one batch."""

import math

import pytest
import torch
from torch.testing import assert_close

from ds_cmli.config.registry import LOSSES, load
from ds_cmli.config.schema import LossConfig
from ds_cmli.losses.functions import sigmoid_loss
from ds_cmli.models.dual import Start

SCALE, BIAS = torch.tensor([math.log(2.0)]), torch.tensor([-1.0])


def test_by_hand():
    scores = torch.tensor([[1.0, 0.0], [0.5, -0.5]])
    # Logits 2 s - 1: [[1, -1], [0, -2]]; softplus(-1) twice, softplus(0), softplus(2); two images.
    expected = (2 * 0.31326169 + 0.69314718 + 2.12692801) / 2
    assert_close(sigmoid_loss(scores, SCALE, BIAS).item(), expected, rtol=1e-6, atol=0)


def test_several_positives_by_hand():
    scores = torch.tensor([[1.0, 0.0], [0.5, -0.5]])
    # The second text belongs to the first image too: softplus(1) in the place of softplus(-1).
    expected = (0.31326169 + 1.31326169 + 0.69314718 + 2.12692801) / 2
    positives = torch.tensor([[False, True], [False, False]])
    assert_close(sigmoid_loss(scores, SCALE, BIAS, positives=positives).item(), expected, rtol=1e-6, atol=0)


def test_gradients_by_hand():
    scores = torch.tensor([[1.0, 0.0]], requires_grad=True)
    scale, bias = SCALE.clone().requires_grad_(), BIAS.clone().requires_grad_()
    sigmoid_loss(scores, scale, bias, first=0).backward()
    pair, other = -1 / (1 + math.e), 1 / (1 + math.e)  # d/dlogit: sigmoid(1) - 1 of the pair, sigmoid(-1) of the other
    assert_close(scores.grad, 2 * torch.tensor([[pair, other]]))
    assert_close(bias.grad, torch.tensor([pair + other]), atol=1e-7, rtol=0)
    assert_close(scale.grad, torch.tensor([2 * pair]))  # d logit / d ln t = t s


@pytest.mark.parametrize("ranks", [2, 3])
def test_the_mean_of_the_ranks_blocks_is_the_loss_of_the_batch(ranks):
    scores = torch.randn(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    whole = sigmoid_loss(scores, SCALE, BIAS)
    B = 6 // ranks
    blocks = [sigmoid_loss(scores[r * B : (r + 1) * B], SCALE, BIAS, first=r * B) for r in range(ranks)]
    assert_close(torch.stack(blocks).mean(), whole, rtol=1e-12, atol=0)


def test_each_has_a_temperature_and_a_bias_of_its_own():
    for name, kind in (("global_sigmoid", "global"), ("cmli_sigmoid", "cmli")):
        loss = load(LOSSES[name])(LossConfig())
        assert {n for n, _ in loss.named_parameters()} == {"logit_scale", "logit_bias"}
        assert LOSSES[name].scores == kind and not LOSSES[name].teacher


@pytest.mark.parametrize("name", ["global_sigmoid", "cmli_sigmoid"])
def test_a_given_bias_is_kept_from_a_source_too(name):
    loss = load(LOSSES[name])(LossConfig(weights={name: 1.0}, init_bias=-3.5))
    loss.start_from(Start(log_scale=math.log(116.0), bias=-12.9))
    assert loss.logit_bias.item() == -3.5
