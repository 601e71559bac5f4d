"""The command on an untrained model: what it reads, prints and refuses."""

import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from ds_cmli.common.errors import UserError
from ds_cmli.evaluate.__main__ import command
from tests.run_folder import write_run

WORDS = ("red apple", "green pear", "blue bird", "black cat")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(write_run(tmp_path_factory.mktemp("run")))


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photographs")
    for k in range(12):
        pixels = np.random.default_rng(k).integers(0, 256, (4, 6, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((90, 60), Image.Resampling.BICUBIC).save(folder / f"{k}.jpg")
    return folder


def evaluate(tmp_path, *arguments):
    """What is printed, and the metrics."""
    done = CliRunner().invoke(command, [*arguments, "--json", str(tmp_path / "x.json")], catch_exceptions=True)
    if done.exception:
        raise done.exception
    return done.output, json.loads((tmp_path / "x.json").read_text())


def karpathy(path):
    images = [
        {"filename": f"{k}.jpg", "split": split, "sentences": [{"raw": f"{WORDS[k % 4]} {c}"} for c in range(5)]}
        for k, split in enumerate(["train"] * 3 + ["val"] * 3 + ["test"] * 6)
    ]
    path.write_text(json.dumps({"images": images}))
    return str(path)


@pytest.mark.parametrize("workers", ["0", "2"])
def test_karpathys_test_split_with_five_captions_a_picture_and_folds(tmp_path, model, photographs, workers):
    data = ["--data", karpathy(tmp_path / "dataset.json"), "--image-root", str(photographs), "--workers", workers]
    printed, result = evaluate(tmp_path, "--checkpoint", model, *data, "--split", "test", "--fold-size", "3")
    assert "test 30 pairs, 6 pictures" in printed and "    fold/combined  " in printed
    assert result["eval/test/chance/t2i_r1"] == pytest.approx(1 / 6)
    # Three pictures of which the first five hold them all.
    assert result["eval/test/fold/global/t2i_r5"] == 1 and result["eval/test/fold/global/t2i_r1"] > 0
    ways = [f"{way}_r{k}" for way in ("i2t", "t2i") for k in (1, 5, 10)]
    mean = sum(result[f"eval/test/cmli/{way}"] for way in ways) / 6
    assert result["eval/test/cmli/mean_recall"] == pytest.approx(mean)
    every = evaluate(tmp_path, "--checkpoint", model, *data, "--split", "all")[1]
    assert every["eval/all/pictures"] == 12


def test_zero_shot(tmp_path, model):
    for k, name in enumerate(WORDS):
        folder = tmp_path / "classes" / name.replace(" ", "_")
        folder.mkdir(parents=True)
        for n in range(3):
            Image.new("RGB", (30, 20), (80 * k, 200 - 60 * k, 90 * n)).save(folder / f"{n}.png")
    (tmp_path / "classes" / "red_apple" / "2.png").write_bytes(b"no picture")
    (tmp_path / "templates.txt").write_text("a photo of a {}.\na drawing of a {}.\n")
    for more in ([], ["--templates", str(tmp_path / "templates.txt")]):
        chosen = ["--zero-shot", str(tmp_path / "classes"), *more]
        printed, result = evaluate(tmp_path, "--checkpoint", model, *chosen)
        assert "11 pictures, 4 classes, 1 left out: 2.png (cannot identify" in printed
        assert result["zero_shot/combined/top5"] == 1 and result["zero_shot/chance/top1"] == 0.25
        assert 0 <= result["zero_shot/cmli/top1"] <= 1


def entities(path, photographs):
    """Two captions of each of four photographs of 90 x 60 pixels, of which the middle 60 x 60 are seen."""
    for part in ("Annotations", "Sentences"):
        (path / part).mkdir(parents=True)
    for k in range(4):
        sentences = [f"[/EN#{k}/animals {WORDS[k]}] on [/EN#9/other grass] .", f"some [/EN#{k}/animals {WORDS[k]}] ."]
        (path / "Sentences" / f"{k}.txt").write_text("\n".join(sentences))
        box = "<bndbox><xmin>15</xmin><ymin>0</ymin><xmax>45</xmax><ymax>60</ymax></bndbox>"
        (path / "Annotations" / f"{k}.xml").write_text(
            "<annotation><size><width>90</width><height>60</height></size>"
            f"<object><name>{k}</name>{box}</object><object><name>9</name><scene>1</scene></object></annotation>"
        )
    (path / "test.txt").write_text("0\n1\n3\n")
    return ["--boxes", str(path), "--image-root", str(photographs)]


def test_the_pointing_game_on_boxes(tmp_path, model, photographs):
    chosen = entities(tmp_path / "entities", photographs)
    printed, result = evaluate(tmp_path, "--checkpoint", model, *chosen, "--split", "test")
    assert "6 phrases, 3 pictures, 100% of them" in printed
    # The box is the left half of what is seen: half of the patches' centres.
    assert result["entities/chance/pointing_game"] == pytest.approx(0.5)
    assert result["entities/pointing_game"] * 6 == pytest.approx(round(result["entities/pointing_game"] * 6))
    with pytest.raises(UserError, match=r"--split is 'val': .* has the lists test; 'all' takes every picture"):
        evaluate(tmp_path, "--checkpoint", model, *chosen)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--data", ""], "--data is empty: give a value, or leave it out"),
        (["--data", "red\udcff"], r"--data is 'red\udcff', which is no Unicode: rename it"),
        (["--zero-shot", ""], "--zero-shot is empty"),
        (["--fold-size", "0"], "--fold-size is 0: give at least 1"),
        (["--zero-shot", ".", "--fold-size", "5"], "--fold-size has no effect with --zero-shot"),
        (["--templates", "x"], "--templates has no effect without --zero-shot"),
        (["--boxes", "."], "--boxes needs --image-root"),
        (["--boxes", ".", "--image-root", "."], "give Flickr30k Entities' folder, with Annotations/ and Sentences/"),
        (["--data", "demo", "--split", "test"], "--split is 'test': the demo has its own two"),
        (["--data", "demo", "--fold-size", "7"], "--fold-size is 7: the split has 300 pictures, which is no multiple"),
    ],
)
def test_mistakes_are_one_line(tmp_path, model, arguments, words):
    with pytest.raises(UserError) as error:
        evaluate(tmp_path, "--checkpoint", model, *arguments)
    assert words in str(error.value)
    assert not torch.distributed.is_initialized()  # a process that exits with its group up may abort
