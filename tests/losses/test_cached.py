"""The losses over pairs of a step, whose image rows come in blocks of a byte budget.

K micro-batches of B pairs, G = K * B texts, N patches, M text positions, H student width, D embedding dimension.
"""

from functools import partial

import pytest
import torch

from ds_cmli.cmli import cmli_scores
from ds_cmli.config.presets import load_preset
from ds_cmli.losses import LOSSES
from ds_cmli.losses.cached import PairFeatures, pair_gradients
from ds_cmli.losses.objective import Objective
from ds_cmli.memory.inputs import longest_batch
from ds_cmli.models.student import Student

K, B, N, M, D = 3, 4, 16, 8, 16
G = K * B
ROW = G * (N + M)  # bytes of the argmax indices of an image and all texts: one each, as N and M are below 256


@pytest.fixture(scope="module")
def objective():
    torch.manual_seed(0)
    weights = {"global": 1.0, "cmli": 0.7, "cmli_sigmoid": 0.4}
    config = load_preset("tiny", {"loss": {"weights": weights}})
    student = Student(config.student, config.data.image_size, 300, config.data.context_length)
    return Objective(student, config.loss, None).double()


def features(objective):
    """Equal at each call, as `pair_gradients` overwrites them."""
    torch.manual_seed(1)
    H = objective.student.width
    randn = partial(torch.randn, dtype=torch.float64)
    out = []
    for k in range(K):
        mask = torch.arange(M) < torch.randint(2, M + 1, (B, 1))
        pair_id = torch.arange(k * B, (k + 1) * B)[:, None].expand(B, 2)
        out.append(PairFeatures(mask, pair_id, randn(B, H), randn(B, H), randn(B, N, D), randn(B, M, D)))
    return out


@torch.no_grad()
def test_only_the_features_are_kept(device, objective):
    batch = longest_batch(load_preset("tiny", {}), B)
    found = objective.embed(batch)
    shapes = {name: tuple(x.shape) for name, x in vars(found).items() if isinstance(x, torch.Tensor)}
    H = objective.student.width
    assert shapes["image_cls"] == shapes["text_cls"] == (B, H) and shapes["patches"] == (B, N, D)
    assert all(x.untyped_storage().nbytes() == x.nbytes for x in found.tensors())


def computed(objective, argmax_bytes):
    """What `pair_gradients` gives with this budget, the cached gradients, and the rows of each call of the op."""
    rows, cached = [], features(objective)

    def score(patches, tokens, mask):
        assert len(tokens) == G
        rows.append(len(patches))
        return cmli_scores(patches, tokens, mask)

    losses = {name: objective.losses[name] for name in objective.config.weights if LOSSES[name].scores}
    weights = objective.config.weights
    found = pair_gradients(losses, weights, cached, score, torch.device("cpu"), 1.0, argmax_bytes)
    return found, [x for each in cached for x in each.tensors()], rows


@pytest.mark.parametrize("budget, R", [(ROW * B, B), (ROW * B - 1, 3), (ROW * 2, 2), (ROW * 2 - 1, 1), (1, 1)])
def test_argmax_indices_of_a_block_stay_within_the_budget(device, objective, budget, R):
    whole, expected, _ = computed(objective, 1 << 30)
    found, gradients, rows = computed(objective, budget)
    assert max(rows) == R and (budget >= R * ROW or R == 1)
    assert sum(rows) == 2 * G  # each row once for the columns' sums, and once with its gradient
    torch.testing.assert_close(found.total, whole.total, rtol=1e-12, atol=0)
    for name in whole.each:
        torch.testing.assert_close(found.each[name], whole.each[name], rtol=1e-12, atol=0)
    for ours, theirs in zip(gradients, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-15)
    for ours, theirs in zip(found.parameters, whole.parameters, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-15)
