"""Match maps: tints by hand, every word drawn, in any letters; which pairs are shown, and the command."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from ds_cmli.config.presets import load_preset
from ds_cmli.evaluate.match_map import FONT_SIZE, GAP, LINE, TILE, load_font, sheet, tile
from ds_cmli.visualize import command, held_out_pairs
from tests import make
from tests.make import write_run

GREY = torch.full((3, 8, 8), 200, dtype=torch.uint8)


def match(*words: str) -> SimpleNamespace:
    return SimpleNamespace(words=[*words], similarity=torch.rand(len(words), 4), grid=(2, 2))


def test_a_patch_is_tinted_by_the_square_of_its_share():
    grey = 155  # behind a tint: 255 - (255 - 155) / 2 = 205
    result = tile(torch.full((3, 80, 80), float(grey)), torch.tensor([0.2, 0.2, 0.7, 0.45]), (2, 2))
    places = ((20, 20), (20, 60), (60, 20), (60, 60))
    first_tint, second_tint, best_tint, last_tint = (205 - result[:, row, column] for row, column in places)
    assert not first_tint.any() and not second_tint.any() and best_tint.amin() > 20
    torch.testing.assert_close(last_tint, best_tint / 4)  # halfway from the others to the best
    for row, column in ((41, 20), (78, 20), (60, 1), (60, 38)):  # a frame around the best, also at edges
        assert (result[:, row, column] < 50).all(), (row, column)
    assert (result[:, 1, 1] == 205).all()
    flat = tile(torch.full((3, 80, 80), float(grey)), torch.ones(4), (2, 2))  # fits everywhere alike
    assert (flat[:, 60, 60] == 205).all()


def test_words_in_any_letters_fill_rows():
    many = match(*["a"] * 50)
    row_height = LINE + TILE + GAP
    drawn = np.asarray(sheet(GREY, "", many))
    assert len(drawn) == GAP + 9 * row_height  # the picture and 50 words, six in a row
    for row in range(9):
        tile_of_row = drawn[GAP + row * row_height :][:row_height, GAP : GAP + TILE]
        assert (tile_of_row < 255).all(2).any(1).sum() >= TILE, f"row {row} has no whole tile"
    assert sheet(GREY, "", match("猫" * 99, "ł", "")).height == GAP + row_height


def test_long_words_and_captions_are_drawn_whole():
    drawn = np.asarray(sheet(GREY, "W" * 96, match("w" * 60)))
    assert (drawn[:, -GAP:] == 255).all(), "the caption reaches the edge"
    label = drawn[GAP + LINE : GAP + 2 * LINE, GAP + TILE :]
    assert (label[:, GAP + TILE :] == 255).all(), "the word reaches beyond its tile"
    assert (label < 255).any()


@pytest.mark.skipif(load_font(FONT_SIZE).getname()[0] != "DejaVu Sans", reason="DejaVu Sans is not installed")
def test_letters_with_accents_are_not_drawn_as_boxes():
    drawn = np.asarray(sheet(GREY, "", match("é", "ü")))
    labels = [drawn[GAP : GAP + LINE, x : x + TILE] for x in (2 * GAP + TILE, 3 * GAP + 2 * TILE)]
    assert not np.array_equal(*labels)


def test_pairs_that_are_asked_for(tmp_path):
    """The second of six held-out pictures with three captions each is broken."""
    images = []
    for i in range(8):
        Image.fromarray(np.full((20, 20, 3), 30 * i, np.uint8)).save(tmp_path / f"{i}.png")
        images.append((f"{i}.png", "train" if i < 2 else "val", [f"A 猫 of {i}, Caption {c}!" for c in range(3)]))
    (tmp_path / "3.png").write_bytes(b"no picture")
    source = make.karpathy(tmp_path / "dataset.json", images)
    config = load_preset("tiny", {"data": {"source": source}})
    shown = held_out_pairs(config, "0,2")
    assert [text for _, text in shown] == ["A 猫 of 2, Caption 0!", "A 猫 of 4, Caption 0!"]
    assert [int(image[0, 5, 5]) for image, _ in shown] == [60, 120]
    for numbers in ("0,1", "6"):
        line = make.refused(held_out_pairs, config, numbers)
        assert f"--pairs is '{numbers}': give numbers of the 6 pictures of " in line


def test_the_command_writes_a_picture_of_each_pair(tmp_path):
    run = str(write_run(tmp_path))
    Image.new("RGB", (30, 20), "red").save(tmp_path / "a.png")
    options = ["--image", str(tmp_path / "a.png"), "--text", "a red car", "--output", str(tmp_path / "maps")]
    done = CliRunner().invoke(command, [run, *options], catch_exceptions=False)
    assert "match maps of 1 pair" in done.output and (tmp_path / "maps" / "match-0.png").stat().st_size > 1000
