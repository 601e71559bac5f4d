"""Equations (2), (7), (9) and (10) by hand, and matching with a trained projection."""

import pytest
import torch
from torch import nn

from ds_cmli.cmli import CMLILoss
from ds_cmli.config.schema import LossConfig
from ds_cmli.losses.target_cmli import (
    ClsDistillation,
    Features,
    TargetCMLI,
    WidthHead,
    match_patches,
    target_image_loss,
    target_text_loss,
)
from ds_cmli.models.teacher import Targets

# B=2, N=3, M=2, H=2. Each patch of the teacher is 1 in one place; of the second text one token is valid.
TEACHER = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [2.0, 2.0]], [[0.0, 3.0], [1.0, 1.0], [1.0, 0.0]]])
PATCHES = torch.tensor([[[1.0, 2.0], [0.0, 1.0], [2.0, 0.0]], [[0.0, 3.0], [1.0, 1.0], [1.0, 4.0]]])
TOKENS = torch.tensor([[[3.0, 0.0], [1.0, 1.0]], [[0.0, 1.0], [9.0, 9.0]]])
MASK = torch.tensor([[True, True], [True, False]])


def test_each_token_matches_its_most_similar_patch_and_a_tie_the_first():
    assert match_patches(TOKENS, TEACHER).tolist() == [[0, 2], [0, 1]]
    assert match_patches(torch.ones(1, 1, 2), torch.ones(1, 3, 2)).tolist() == [[0]]


@pytest.mark.parametrize("reduction, H", [("mean", 2), ("sum", 1)])
def test_the_losses_by_hand(reduction, H):
    # (7): squared distances of the patches are 4, 0, 4 and 0, 0, 16.
    image = ((4 + 0 + 4) / 3 + (0 + 0 + 16) / 3) / 2 / H
    assert target_image_loss(PATCHES, TEACHER, reduction).item() == pytest.approx(image)
    # (9): of tokens and their matches 4 and 2, a mean over two tokens; and 4, over one.
    text = ((4 + 2) / 2 + 4) / 2 / H
    match = match_patches(TOKENS, TEACHER)
    assert target_text_loss(TOKENS, TEACHER, match, MASK, reduction).item() == pytest.approx(text)
    # (10), and other weights of the two.
    for of_image, of_text in ((1.0, 1.0), (0.5, 4.0), (0.0, 2.0), (2.0, 0.0)):
        weights = {"target_image_weight": of_image, "target_text_weight": of_text}
        loss = TargetCMLI(LossConfig(mse_reduction=reduction, **weights), None)
        assert of(loss).item() == pytest.approx((of_image * image + of_text * text) / 2)


class Same:
    """A student whose projection changes nothing."""

    projection = nn.Identity()


def of(loss, head=None, targets=None):
    features = Features(PATCHES[:, 0], PATCHES, TOKENS[:, 0], TOKENS, MASK)
    return loss(features, targets or Targets(TEACHER[:, 0], TEACHER), Same(), head)


def test_class_tokens_by_hand():
    # Squared distances: of images 4 and 0, of texts 4 and 4.
    loss = ClsDistillation(LossConfig(mse_reduction="sum"), None)
    assert of(loss).item() == pytest.approx(((4 + 0) / 2 + (4 + 4) / 2) / 2)


def test_a_wider_teacher_is_reached_by_an_orthonormal_head():
    torch.manual_seed(0)
    head = WidthHead(2, 5)
    assert torch.allclose(head(head(PATCHES), back=True), PATCHES, atol=1e-6)
    wide = Targets(head(TEACHER[:, 0]), head(TEACHER))
    loss = TargetCMLI(LossConfig(mse_reduction="sum"), None)
    assert of(loss, head, wide).item() == pytest.approx(of(loss).item(), rel=1e-5)


N, M, H, D = 16, 8, 32, 16


def test_matching_is_far_above_chance_with_a_trained_g_and_at_chance_with_two_random_projections():
    """Tokens name patches of their own image, seen through another modality's fixed random rotation."""
    torch.manual_seed(0)
    rotation, _ = torch.linalg.qr(torch.randn(H, H))

    def draw(count: int):
        patches = torch.randn(count, N, H)
        planted = torch.stack([torch.randperm(N)[:M] for _ in range(count)])
        return patches, patches.gather(1, planted[:, :, None].expand(-1, -1, H)) @ rotation, planted

    encoder, g, loss = nn.Linear(H, H, bias=False), nn.Linear(H, D, bias=False), CMLILoss(0.05)
    optimizer = torch.optim.Adam([*encoder.parameters(), *g.parameters()], lr=1e-2)
    mask = torch.ones(32, M, dtype=torch.bool)
    for _ in range(200):
        patches, tokens, _ = draw(32)
        optimizer.zero_grad()
        loss(g(patches), g(encoder(tokens)), mask).backward()
        optimizer.step()
    patches, tokens, planted = draw(200)
    with torch.no_grad():
        trained = (match_patches(g(encoder(tokens)), g(patches)) == planted).float().mean()
        separate = (match_patches(nn.Linear(H, D)(encoder(tokens)), nn.Linear(H, D)(patches)) == planted).float().mean()
    # 1600 tokens: the standard error at chance is 0.006.
    assert trained > 0.8 and abs(separate - 1 / N) < 0.03
