"""The losses over pairs of a step, whose pairs come in tiles of a byte budget.

K micro-batches of B pairs, G = K * B texts, N patches, M text positions, H student width, D embedding dimension.
"""

from functools import partial

import pytest
import torch

from ds_cmli.cmli import cmli_scores
from ds_cmli.common.probe import Probe
from ds_cmli.config.presets import load_preset
from ds_cmli.losses.cached import PairLosses
from ds_cmli.losses.objective import Objective
from ds_cmli.losses.pair_features import CachedStep, PairFeatures
from ds_cmli.losses.tiles import LEAST_PAIRS, TileSide
from ds_cmli.memory.inputs import longest_batch
from ds_cmli.models.student import Student

K, B, N, M, D = 3, 4, 16, 8, 16
G = K * B
ROW = B * (N + M)  # bytes of the argmax indices of B images and a text: one each, as N and M are below 256


@pytest.fixture(scope="module")
def objective():
    torch.manual_seed(0)
    weights = {"global": 1.0, "cmli": 0.7, "cmli_sigmoid": 0.4}
    config = load_preset("tiny", {"loss": {"weights": weights}})
    student = Student(config.student, config.data.image_size, 300, config.data.context_length)
    return Objective(student, config.loss, None).double()


def features(objective):
    """Equal at each call, as `PairLosses.gradients` overwrites them."""
    torch.manual_seed(1)
    H = objective.student.width
    randn = partial(torch.randn, dtype=torch.float64)
    out = []
    for k in range(K):
        mask = torch.arange(M) < torch.randint(2, M + 1, (B, 1))
        pair_id = torch.arange(k * B, (k + 1) * B)[:, None].expand(B, 2)
        shapes = {"image_cls": (B, H), "text_cls": (B, H), "patches": (B, N, D), "tokens": (B, M, D)}
        out.append(PairFeatures({name: randn(*shape) for name, shape in shapes.items()}, mask, pair_id))
    return out


@torch.no_grad()
def test_only_the_features_are_kept(device, objective):
    batch = longest_batch(load_preset("tiny", {}), B)
    result = objective.embed(batch)
    shapes = {name: tuple(x.shape) for name, x in result.features.items()}
    H = objective.student.width
    assert shapes["image_cls"] == shapes["text_cls"] == (B, H) and shapes["patches"] == (B, N, D)
    assert all(x.untyped_storage().nbytes() == x.nbytes for x in result.tensors())


def computed(objective, argmax_bytes, weights=None):
    """What `PairLosses` gives with this budget, the cached gradients, and the texts of each call of the op."""
    texts, cached = [], features(objective)

    def score(patches, tokens, mask, patch_mask):
        assert len(patches) == B
        texts.append(len(tokens))
        return cmli_scores(patches, tokens, mask)

    weights = weights or objective.config.weights
    losses = {name: objective.losses[name] for name in weights}
    step = CachedStep(cached, torch.device("cpu"))
    outcome = PairLosses(step, losses, weights, score, argmax_bytes).gradients()
    return outcome, [x for item in cached for x in item.tensors()], texts


@pytest.mark.parametrize("budget, T", [(ROW * G, G), (ROW * G - 1, 11), (ROW * B, B), (ROW * B - 1, 3), (1, 1)])
def test_argmax_indices_of_a_tile_stay_within_the_budget(device, objective, budget, T):
    whole, expected, _ = computed(objective, 1 << 30)
    entry, gradients, texts = computed(objective, budget)
    assert max(texts) == T and (budget >= T * ROW or T == 1)
    assert sum(texts) == 2 * G * K  # each tile once for the sums, and once with its gradient
    torch.testing.assert_close(entry.total, whole.total, rtol=1e-12, atol=0)
    for name in whole.losses:
        torch.testing.assert_close(entry.losses[name], whole.losses[name], rtol=1e-12, atol=0)
    for ours, theirs in zip(gradients, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-15)
    for ours, theirs in zip(entry.parameters, whole.parameters, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-15)


def test_a_tile_has_no_more_pairs_than_a_micro_batch(device, objective, monkeypatch):
    monkeypatch.setattr("ds_cmli.losses.tiles.LEAST_PAIRS", 1)
    assert computed(objective, 1 << 30)[2] == [B] * 2 * K * K
    # The first pass, which saves no indices, may have more; then each tile once with its gradient.
    monkeypatch.setattr("ds_cmli.losses.tiles.LEAST_PAIRS", 3 * B)
    assert computed(objective, 1 << 30)[2] == [G] * K + [B] * K * K
    monkeypatch.setattr("ds_cmli.losses.tiles.LEAST_PAIRS", 8 * B)
    assert computed(objective, 1 << 30)[2] == [G] * K + [8, 4] * K


def test_sums_that_no_loss_uses_are_not_computed(device, objective):
    _, _, texts = computed(objective, 1 << 30, {"cmli_sigmoid": 1.0})
    assert texts == [G] * K


def test_on_a_gpu_bytes_alone_bound_a_tile(monkeypatch):
    patches = torch.zeros(4, 10, 8)  # of 4 images
    images = TileSide(0, torch.zeros(4, 2, dtype=torch.int64), {"patches": patches}, None)
    pair = 10 + 6  # bytes of the argmax indices of a pair with 6 text positions
    assert images.texts_of_a_tile(6, 10**9) == LEAST_PAIRS // 4
    monkeypatch.setattr(Probe, "on_gpu", lambda self, device: True)
    assert images.texts_of_a_tile(6, 4 * pair * 5000) == 5000
