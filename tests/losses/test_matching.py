"""Target-CMLI's matching on pairs with a planted token-to-patch match, chance 1/N."""

import torch
from torch import nn

from ds_cmli.cmli.loss import CMLILoss
from ds_cmli.losses.functions import match_patches

N, M, H, D = 16, 8, 32, 16


class Pairs:
    """Tokens that name patches of their own image, seen through another modality's fixed random rotation."""

    def __init__(self):
        self.generator = torch.Generator().manual_seed(0)
        self.rotation, _ = torch.linalg.qr(torch.randn(H, H, generator=self.generator))

    def draw(self, count: int):
        patches = torch.randn(count, N, H, generator=self.generator)
        planted = torch.stack([torch.randperm(N, generator=self.generator)[:M] for _ in range(count)])
        tokens = patches.gather(1, planted[:, :, None].expand(-1, -1, H)) @ self.rotation
        return patches, tokens, planted


def accuracy(tokens, patches, planted) -> float:
    return (match_patches(tokens, patches) == planted).float().mean().item()


def test_matching_is_far_above_chance_with_a_trained_g_and_at_chance_with_two_random_projections():
    torch.manual_seed(0)
    pairs = Pairs()
    encoder, g = nn.Linear(H, H, bias=False), nn.Linear(H, D, bias=False)
    loss = CMLILoss(0.05)
    optimizer = torch.optim.Adam([*encoder.parameters(), *g.parameters()], lr=1e-2)
    mask = torch.ones(32, M, dtype=torch.bool)
    for _ in range(200):
        patches, tokens, _ = pairs.draw(32)
        optimizer.zero_grad()
        loss(g(patches), g(encoder(tokens)), mask).backward()
        optimizer.step()

    patches, tokens, planted = pairs.draw(200)
    with torch.no_grad():
        trained = accuracy(g(encoder(tokens)), g(patches), planted)
        separate = accuracy(nn.Linear(H, D)(encoder(tokens)), nn.Linear(H, D)(patches), planted)
    print(f"chance {1 / N:.3f}: trained by CMLI {trained:.3f}, two random projections {separate:.3f}")
    # 1600 tokens: the standard error at chance is 0.006.
    assert trained > 0.8
    assert abs(separate - 1 / N) < 0.03
