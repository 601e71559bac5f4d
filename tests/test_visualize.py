"""Match maps: which pairs are shown, and that each is written as a picture."""

import json

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from ds_cmli.common import UserError
from ds_cmli.config.presets import load_preset
from ds_cmli.visualize import command, held_out
from tests.make import write_run


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
    result = held_out(config, None, None, None)
    assert [text for _, text in result] == [f"A 猫 of {i}, Caption 0!" for i in (2, 4, 5, 6)]
    assert len({int(image[0, 0, 0]) for image, _ in result}) == 4


def test_pairs_that_are_asked_for(config):
    assert [text[7:] for _, text in held_out(config, None, None, [0, 2])] == ["2, Caption 0!", "4, Caption 0!"]
    for number in (1, 6):
        with pytest.raises(UserError, match=rf"--pairs is \[{number}\], of the 6 pictures of "):
            held_out(config, None, None, [number])


def test_the_command_writes_a_picture_of_each_pair(tmp_path):
    run = str(write_run(tmp_path))
    Image.new("RGB", (30, 20), "red").save(tmp_path / "a.png")
    given = ["--image", str(tmp_path / "a.png"), "--text", "a red car", "--output", str(tmp_path / "maps")]
    done = CliRunner().invoke(command, [run, *given], catch_exceptions=False)
    assert "match maps of 1 pair" in done.output and (tmp_path / "maps" / "match-0.png").stat().st_size > 1000
