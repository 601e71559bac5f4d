"""A match map as a picture: tints by hand, every word drawn, in any letters."""

from types import SimpleNamespace

import pytest
import torch

from ds_cmli.evaluate.match_map import COLUMNS, sheet, tile


def match(*words: str) -> SimpleNamespace:
    return SimpleNamespace(words=[*words], similarity=torch.rand(len(words), 4), grid=(2, 2))


def test_each_patch_is_tinted_by_the_square_of_its_share():
    picture = torch.full((3, 80, 80), 155.0)  # behind a tint: 255 - (255 - 155) / 2 = 205
    result = tile(picture, torch.tensor([0.2, 0.2, 0.7, 0.45]), (2, 2))
    assert result[:, 20, 20].tolist() == result[:, 20, 60].tolist() == [205, 205, 205]
    # The accent is (111, 75, 216); of its ink 0.9 for the best patch, 0.9 / 4 for one halfway.
    best, half = ([205 * (1 - share * (1 - c / 255)) for c in (111, 75, 216)] for share in (0.9, 0.225))
    assert result[:, 60, 20].tolist() == pytest.approx(best) and result[:, 60, 60].tolist() == pytest.approx(half)
    assert result[:, 41, 1].tolist() == [29, 29, 29] != result[:, 1, 1].tolist()  # a frame around the best
    flat = tile(picture, torch.ones(4), (2, 2))  # fits everywhere alike
    assert flat[:, 60, 60].tolist() == [205, 205, 205]


def test_words_fill_rows():
    image = torch.full((3, 8, 8), 200, dtype=torch.uint8)
    some = (1, COLUMNS - 1, COLUMNS, 2 * COLUMNS)
    heights = [sheet(image, "a", match(*["a"] * words)).height for words in some]
    assert heights[0] == heights[1] < heights[2] < heights[3]
    assert sheet(image, "", match("猫" * 99, "ł", "")).height > 0
