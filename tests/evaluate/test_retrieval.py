"""Retrieval of a whole split, on any number of ranks: its numbers, what is broken, and what is drawn of it."""

import copy
import json
from unittest import mock

import pytest
import torch
from PIL import Image

from ds_cmli.common import UserError
from ds_cmli.config.presets import load_preset
from ds_cmli.data.build import build_data
from ds_cmli.data.sources import Files
from ds_cmli.evaluate.embed import Evaluator
from ds_cmli.evaluate.match_map import match_maps
from ds_cmli.evaluate.metrics import summary
from ds_cmli.evaluate.retrieval import evaluate_split
from ds_cmli.models.student import Student
from tests.ranks import run

CPU = torch.device("cpu")
CAPTIONS, PICTURES = 3, 5


def untrained(length):
    """A model of random weights, and the first scenes."""
    from ds_cmli.engine import build_models

    config = load_preset("tiny", {"run": {"seed": 3}})
    data = build_data(config.data, 0)
    objective, _ = build_models(config, data.vocab_size)
    scenes = copy.copy(data.evals["seen"])
    scenes.length = length
    return Evaluator(objective, data.tokenizer, CPU, 2), scenes


def on_rank(rank, world_size, path):
    """Of scenes, figures and match maps; of a folder with a broken picture, figures and the pictures that are read."""
    model, scenes = untrained(11)
    figures, own = evaluate_split(model, scenes)
    maps = match_maps(own, model.tokenizer, model.student.grid, 5)
    opened, read = [], Files.image
    with mock.patch.object(Files, "image", lambda source, i: opened.append(source.name(i)) or read(source, i)):
        return figures, maps, score(path), [file for file in opened if file != "a.png"]


def test_ranks_share_the_work_and_agree_with_one_process(tmp_path, monkeypatch):
    folder(tmp_path)
    (tmp_path / "validation" / "1.png").write_bytes(b"no picture")
    expected, maps, of_folder, opened = on_rank(0, 1, tmp_path)
    results = run(on_rank, 3, tmp_path)  # 11 pictures on 3 ranks: shares of 4, 4 and 3
    for figures, drawn, also, _ in results:
        assert figures == pytest.approx(expected, abs=1e-9) and also == of_folder
        assert len(drawn) == 5 and all((one == other).all() for one, other in zip(drawn, maps, strict=True))
    assert sorted(file for *_, files in results for file in files) == opened  # each is read once
    # Scored in several blocks: the same again.
    monkeypatch.setattr("ds_cmli.evaluate.retrieval.PICTURES", 4)
    assert on_rank(0, 1, tmp_path)[0] == pytest.approx(expected, abs=1e-9)
    assert 0 < expected["pointing_game"] < 1
    assert (expected["pairs"], expected["pictures"]) == (11, 11)
    assert expected["chance/t2i_r5"] == pytest.approx(5 / 11)


def test_training_mode_and_random_numbers_stay_as_they_were():
    model, scenes = untrained(3)
    model.module.train()
    before = torch.random.get_rng_state()
    _, own = evaluate_split(model, scenes)
    match_maps(own, model.tokenizer, model.student.grid, 2)
    assert model.module.training and torch.equal(before, torch.random.get_rng_state())


def folder(path):
    (path / "train").mkdir()
    (path / "validation").mkdir()
    Image.new("RGB", (8, 8)).save(path / "train" / "a.png")
    (path / "train" / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "square 0"}\n')
    rows = []
    for number in range(PICTURES):
        Image.new("RGB", (8, 8), (40 * number, 0, 0)).save(path / "validation" / f"{number}.png")
        rows += [{"file_name": f"{number}.png", "text": f"square {number}"}] * CAPTIONS
    (path / "validation" / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


class Colours(torch.nn.Module):
    """Stands in for the objective: embeds a picture by its colour and a caption by the number of its picture."""

    image_embeddings, text_embeddings = Student.image_embeddings, Student.text_embeddings
    projection = torch.nn.Identity()
    grid = (1, 1)

    def __init__(self, tokenizer, constant=False):
        super().__init__()
        self.digits = {tokenizer(f"square {k}").input_ids[2]: k for k in range(PICTURES)}
        self.constant, self.precise = constant, torch.nn.Parameter(torch.zeros(1))

    @property
    def student(self):
        return self

    def score_scales(self):
        return {"cmli": 10.0, "global": 10.0}

    def encode_image(self, image, grid=None):
        return self._embed((image[:, 0, 0, 0].long() / 40).round().long())

    def encode_text(self, input_ids, attention_mask):
        cls, tokens = self._embed(torch.tensor([self.digits.get(row[2].item(), 0) for row in input_ids]))
        return cls, tokens.expand(-1, input_ids.shape[1], -1)

    def _embed(self, number):
        cls = torch.nn.functional.one_hot(number * (not self.constant), PICTURES).float()
        return cls, cls[:, None]


def score(source, constant=False):
    data = build_data(load_preset("tiny", {"data": {"source": str(source)}}).data, 0)
    model = Evaluator(Colours(data.tokenizer, constant), data.tokenizer, CPU, 4)
    return evaluate_split(model, data.evals["val"])[0]


def recalls(result):
    return {k: v for k, v in result.items() if k.split("/")[0] in ("global", "cmli", "combined")}


def test_perfect_embeddings_of_several_captions_a_picture_are_perfect_and_constant_ones_are_chance(tmp_path):
    folder(tmp_path)
    result = score(tmp_path)
    assert set(recalls(result).values()) == {1.0}
    assert (result["pairs"], result["pictures"]) == (PICTURES * CAPTIONS, PICTURES)
    result = score(tmp_path, constant=True)
    for name, value in recalls(result).items():
        assert value == pytest.approx(result[f"chance/{name.split('/')[1]}"])
    heading, columns, *rows = summary(result, "float32", "val").splitlines()
    assert heading == "  val 15 pairs, 5 pictures, in float32" and max(map(len, [columns, *rows])) < 80
    # Chance: 3 of 15 captions belong to a picture, one of 5 pictures to a caption.
    assert rows[-1].split()[:2] == ["chance", "0.200"] and rows[-1].split()[4] == "0.200"


def test_what_is_broken_is_left_out_counted_and_named(tmp_path):
    folder(tmp_path)
    (tmp_path / "validation" / "1.png").write_bytes(b"no picture")
    (tmp_path / "validation" / "4.png").unlink()
    with open(tmp_path / "validation" / "metadata.jsonl", "a") as file:
        file.write('{"file_name": "0.png", "text": "\\u200b"}\n')
        file.write('{"file_name": "2.png", "text": "square \\udcff"}\n')
        file.write('{"file_name": "3.png", "text": " "}\n')  # a blank caption beside others is none
    result = score(tmp_path)
    assert set(recalls(result).values()) == {1.0}
    assert (result["pairs"], result["pictures"]) == ((PICTURES - 2) * CAPTIONS, PICTURES - 2)
    assert result["left_out"] == 2 * CAPTIONS + 2
    assert result["chance/t2i_r1"] == pytest.approx(1 / 3)
    lines = " ".join(result["left_out_first"])
    for name in (
        "1.png (cannot identify",
        "4.png (no such file)",
        "0.png (caption without",
        "2.png (caption that is no",
    ):
        assert name in lines
    assert "9 pairs, 3 pictures, in bf16, 8 left out: " in summary(result, "bf16", "val")
    for file in (tmp_path / "validation").glob("*.png"):
        file.write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"no picture can be used.*png \(cannot identify"):
        score(tmp_path)
