"""The command on an untrained model: what it reads, prints and refuses."""

import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from safetensors.torch import load_file, save_file

from ds_cmli.common import UserError
from ds_cmli.evaluate.__main__ import command
from ds_cmli.models.hf import AVERAGE, WEIGHTS
from tests.make import write_run
from tests.models.dual_models import clip

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


def test_karpathys_test_split_with_five_captions_a_picture(tmp_path, model, photographs):
    data = ["--data", karpathy(tmp_path / "dataset.json"), "--image-root", str(photographs), "--workers", "2"]
    printed, result = evaluate(tmp_path, "--checkpoint", model, *data, "--split", "test")
    assert "test 30 pairs, 6 pictures, in float32" in printed and "    combined  " in printed
    assert result["eval/test/chance/t2i_r1"] == pytest.approx(1 / 6)
    ways = [f"{way}_r{k}" for way in ("i2t", "t2i") for k in (1, 5, 10)]
    mean = sum(result[f"eval/test/cmli/{way}"] for way in ways) / 6
    assert result["eval/test/cmli/mean_recall"] == pytest.approx(mean)
    every = evaluate(tmp_path, "--checkpoint", model, *data, "--split", "all")[1]
    assert every["eval/all/pictures"] == 12


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
    assert "6 phrases, 3 pictures, in float32" in printed and "100% of the phrases" in printed
    # The box is the left half of what is seen: half of the patches' centres.
    assert result["entities/chance/pointing_game"] == pytest.approx(0.5)
    assert result["entities/pointing_game"] * 6 == pytest.approx(round(result["entities/pointing_game"] * 6))
    with pytest.raises(UserError, match="--split is 'val': --boxes has test, and 'all'"):
        evaluate(tmp_path, "--checkpoint", model, *chosen)
    assert not torch.distributed.is_initialized()  # a process that exits with its group up may abort


def test_choices_between_captions(tmp_path, model, photographs):
    lines = [
        {"image": f"{k}.jpg", "captions": [WORDS[k % 4], WORDS[(k + 1) % 4], "a"], "group": k // 2} for k in range(6)
    ]
    lines[5]["captions"][1] = lines[5]["captions"][0]  # no model can tell them apart
    lines.append({"image": "none.jpg", "captions": ["red", "blue"]})
    file = tmp_path / "choices.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    chosen = ["--choices", str(file), "--image-root", str(photographs)]
    printed, result = evaluate(tmp_path, "--checkpoint", model, *chosen)
    assert "6 choices, 6 pictures, in float32, 2 left out: none.jpg (no such file)" in printed
    assert result["choices/chance/accuracy"] == pytest.approx(1 / 3)

    from ds_cmli.inference import Model

    loaded = Model.load(model, device="cpu")
    right = []
    for line in lines[:6]:
        pictures = loaded.embed_images([str(photographs / line["image"])])
        scores = loaded.scores(pictures, loaded.embed_texts(line["captions"]))["combined"].i2t[0]
        right.append(bool((scores[0] > scores[1:]).all()))
    right[5] = False
    assert result["choices/combined/accuracy"] == pytest.approx(sum(right) / 6)
    assert result["choices/combined/group"] == sum(a and b for a, b in zip(right[::2], right[1::2], strict=True)) / 3
    file.write_text('{"image": "0.jpg", "captions": ["red"]}\n')
    with pytest.raises(UserError, match="line 1: give two captions or more"):
        evaluate(tmp_path, "--checkpoint", model, *chosen)


def test_a_file_of_weights_is_that_model(tmp_path, photographs):
    folder = write_run(tmp_path)
    torch.manual_seed(1)
    other = {k: torch.randn_like(v) if v.is_floating_point() else v for k, v in load_file(folder / WEIGHTS).items()}
    save_file(other, folder / AVERAGE)
    data = ["--data", karpathy(tmp_path / "dataset.json"), "--image-root", str(photographs), "--split", "all"]
    own, ema = (evaluate(tmp_path, str(folder), *data, *more)[1] for more in ([], ["--ema"]))
    file = str(folder / AVERAGE)
    assert evaluate(tmp_path, file, *data)[1] == ema != own
    assert evaluate(tmp_path, str(folder / WEIGHTS), *data)[1] == own


def test_scores_of_a_plain_clip_are_combined_only_once_trained(tmp_path, photographs):
    start = str(clip(tmp_path / "clip"))
    data = ["--data", karpathy(tmp_path / "dataset.json"), "--image-root", str(photographs), "--split", "all"]
    result = evaluate(tmp_path, start, *data)[1]
    kinds = {name.split("/")[2] for name in result if name.count("/") == 3}
    assert kinds == {"global", "cmli", "chance"}
