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


def test_pairs_that_are_asked_for(tmp_path):
    """Of six held-out pictures with three captions each, the second is broken."""
    entries = []
    for i in range(8):
        file = tmp_path / f"{i}.png"
        Image.fromarray(np.full((20, 20, 3), 30 * i, np.uint8)).save(file)
        if i == 3:
            file.write_bytes(b"no picture")
        sentences = [{"raw": f"A 猫 of {i}, Caption {c}!"} for c in range(3)]
        entries.append({"filename": file.name, "split": "train" if i < 2 else "val", "sentences": sentences})
    (tmp_path / "dataset.json").write_text(json.dumps({"images": entries}))
    config = load_preset("tiny", {"data": {"source": str(tmp_path / "dataset.json")}})
    shown = held_out(config, "0,2")
    assert [text for _, text in shown] == ["A 猫 of 2, Caption 0!", "A 猫 of 4, Caption 0!"]
    assert [int(image[0, 5, 5]) for image, _ in shown] == [60, 120]
    for numbers in ("0,1", "6"):
        with pytest.raises(UserError, match=f"--pairs is '{numbers}': give numbers of the 6 pictures of "):
            held_out(config, numbers)


def test_the_command_writes_a_picture_of_each_pair(tmp_path):
    run = str(write_run(tmp_path))
    Image.new("RGB", (30, 20), "red").save(tmp_path / "a.png")
    given = ["--image", str(tmp_path / "a.png"), "--text", "a red car", "--output", str(tmp_path / "maps")]
    done = CliRunner().invoke(command, [run, *given], catch_exceptions=False)
    assert "match maps of 1 pair" in done.output and (tmp_path / "maps" / "match-0.png").stat().st_size > 1000
