"""Which pairs are shown: of different pictures, and captions as they were written."""

import json

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from ds_cmli.common.errors import UserError
from ds_cmli.config.presets import load_preset
from ds_cmli.visualize.__main__ import command
from ds_cmli.visualize.pairs import held_out, in_turns


def test_each_picture_comes_once_before_any_comes_again():
    assert in_turns([0, 0, 0, 1, 2, 2]) == [0, 3, 4, 1, 5, 2]


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Of six held-out pictures with three captions each, the second is broken."""
    folder = tmp_path_factory.mktemp("pictures")
    entries = []
    for i in range(8):
        file = folder / f"{i}.png"
        Image.fromarray(np.full((20, 20, 3), 30 * i, np.uint8)).save(file)
        if i == 3:
            file.write_bytes(b"no picture")
        sentences = [{"raw": f"A 猫 of {i}, Caption {c}!"} for c in range(3)]
        entries.append({"filename": file.name, "split": "train" if i < 2 else "val", "sentences": sentences})
    (folder / "dataset.json").write_text(json.dumps({"images": entries}))
    return load_preset("tiny", {"data": {"source": str(folder / "dataset.json")}})


def test_the_default_shows_different_pictures_that_can_be_used(config):
    found = held_out(config, None, None, None)
    assert [text for _, _, text in found] == [f"A 猫 of {i}, Caption 0!" for i in (2, 4, 5, 6)]
    assert len({int(image[0, 0, 0]) for _, image, _ in found}) == 4
    assert [title.split(":")[0].rsplit(" ", 1)[1] for title, _, _ in found] == ["0", "2", "3", "4"]


def test_pairs_that_are_asked_for(config):
    found = held_out(config, None, None, [0, 2, 6, 12])
    assert [text[7:] for _, _, text in found] == [
        "2, Caption 0!", "4, Caption 0!", "2, Caption 1!", "2, Caption 2!"
    ]  # fmt: skip
    with pytest.raises(UserError, match="--pairs has 1, which cannot be used"):
        held_out(config, None, None, [1])
    with pytest.raises(UserError, match=r"--pairs has 18: .* has 18 pairs, from 0 on"):
        held_out(config, None, None, [18])


def test_pairs_beside_an_image_are_refused():
    done = CliRunner().invoke(command, ["RUN", "--image", "a.png", "--text", "a", "--pairs", "1"])
    assert str(done.exception) == "--pairs has no effect beside --image: leave it out"
