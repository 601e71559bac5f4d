"""A match map as one picture: tints by hand, no empty row, and words that no font or line has room for."""

from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image, ImageColor

from ds_cmli.common.plots import SOFT
from ds_cmli.data.demo_pictures import on_white
from ds_cmli.evaluate.match_maps import CAPTION, GAP, INK, LABEL, TILE, sheet, tile, wrapped


def match(*words: str) -> SimpleNamespace:
    return SimpleNamespace(words=[*words], similarity=torch.rand(len(words), 4), grid=(2, 2))


def test_each_patch_is_tinted_by_the_square_of_its_share():
    picture = Image.new("RGB", (80, 80), (155, 155, 155))  # behind a tint: 255 - (255 - 155) / 2 = 205
    result = np.asarray(tile(picture, np.array([0.2, 0.2, 0.7, 0.45]), (2, 2)))
    assert result[20, 20].tolist() == result[20, 60].tolist() == [205, 205, 205]
    # The accent is (111, 75, 216); of its ink 0.9 for the best patch, 0.9 / 4 for one halfway.
    best, half = ([205 * (1 - share * (1 - c / 255)) for c in (111, 75, 216)] for share in (0.9, 0.225))
    assert np.abs(result[60, 20] - best).max() < 1 and np.abs(result[60, 60] - half).max() < 1
    assert result[41, 1].tolist() == list(INK) != result[1, 1].tolist()  # a frame around the best
    flat = np.asarray(tile(picture, np.ones(4), (2, 2)))  # fits everywhere alike
    assert flat[60, 60].tolist() == [205, 205, 205]


def test_words_fill_two_rows_beside_the_picture_and_then_whole_rows():
    image = torch.full((3, 8, 8), 200, dtype=torch.uint8)
    row = LABEL + 10 + TILE + GAP // 2
    for words, columns, rows in ((1, 1, 2), (6, 3, 2), (10, 5, 2), (11, 5, 3), (17, 5, 3), (18, 5, 4)):
        width, height = sheet(image, "a", {"": match(*["a"] * words)}).size
        assert width == GAP + (columns + 2) * (TILE + GAP), words
        assert height == GAP + CAPTION + 8 + rows * row + GAP, words
    several = sheet(image, "a", {"one": match("a"), "two": match("a")})
    assert several.height == GAP + CAPTION + 8 + 2 * (LABEL + 12 + 2 * row + GAP)


def test_a_text_without_blanks_and_a_word_that_no_font_has_are_drawn():
    lines = wrapped("猫" * 200 + " end", CAPTION, 300)
    assert "".join(lines) == "猫" * 200 + " end" and len(lines) > 5
    assert wrapped("", CAPTION, 300) == [""]
    image = torch.zeros(3, 4, 4, dtype=torch.uint8)
    assert sheet(image, "ł 猫\U0010fffe", {"": match("猫" * 99, "ł", "")}).height > 0


def test_the_ground_is_transparent_and_letters_are_one_grey_on_any_page():
    picture = sheet(torch.full((3, 8, 8), 200, dtype=torch.uint8), "a word", {"": match("word")})
    pixels = np.asarray(picture)
    heading = pixels[: GAP + CAPTION]
    assert (heading[..., :3] == ImageColor.getrgb(SOFT)).all()  # at the letters' edges too
    assert {0, 255} <= {*heading[..., 3].flat} and pixels[-1, -1, 3] == 0
    inside = pixels[GAP + CAPTION + 8 + LABEL + 10 + TILE, GAP + TILE]
    assert inside.tolist() == [200, 200, 200, 255]
    white = np.asarray(on_white(picture))
    assert white.dtype == np.uint8 and white[-1, -1].tolist() == [255, 255, 255]
