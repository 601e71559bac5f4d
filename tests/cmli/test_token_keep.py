"""FILIP's selection of patches and tokens."""

import torch

from ds_cmli.cmli.token_keep import kept, select

# Two images of four patches, two texts of two tokens and a padding one, in the plane: by angle, in degrees.
IMAGE, TEXT = [[0, 40, 90, 200], [10, 100, 180, 300]], [[5, 95, 40], [170, 20, 90]]
MASK = torch.tensor([[True, True, False], [True, True, False]])


def plane(angles):
    radians = torch.deg2rad(torch.tensor(angles, dtype=torch.float64))
    return 3 * torch.stack([radians.cos(), radians.sin()], -1)  # any length


def test_selected_by_hand():
    result = select(plane(IMAGE), plane(TEXT), MASK, 0.5, 1)
    # Distances to the nearest of the tokens 5, 20, 95, 170: 5, 20, 5, 30 and 5, 5, 10, 65. The first of equal ones.
    assert [sorted(row) for row in result.patches.tolist()] == [[0, 2], [0, 1]]
    # Of one valid token in two: to the nearest patch token 5 has 5, token 95 has 5; 170 has 10, 20 has 10.
    assert result.token_mask.tolist() == [[True, False], [True, False]]
    image, text = result.of(plane(IMAGE), plane(TEXT))
    assert image.shape == text.shape == (2, 2, 2)
    torch.testing.assert_close(image[0, result.patches[0].argsort()], plane([0, 90]))


def test_padding_is_never_kept_and_budgets_change_nothing():
    generator = torch.Generator().manual_seed(0)
    image, text = torch.randn(6, 9, 4, generator=generator), torch.randn(6, 8, 4, generator=generator)
    mask = torch.arange(8) < torch.tensor([8, 1, 3, 5, 0, 2])[:, None]
    whole, rows = (select(image, text, mask, 0.25, budget) for budget in (2**20, 400))
    for ours, theirs in zip(vars(whole).values(), vars(rows).values(), strict=True):
        assert torch.equal(ours, theirs)
    assert whole.token_mask.sum(1).tolist() == [kept(0.25, n) for n in (8, 1, 3, 5, 0, 2)] == [2, 1, 1, 2, 0, 1]
    assert mask.gather(1, whole.tokens)[whole.token_mask].all()
    assert whole.patches.shape == (6, kept(0.25, 9)) == (6, 3)
