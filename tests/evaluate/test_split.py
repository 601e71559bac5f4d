import json

import pytest
import torch
from PIL import Image

from ds_cmli.common.errors import UserError
from ds_cmli.config.presets import load_preset
from ds_cmli.data.build import build_data
from ds_cmli.data.sources import Files
from ds_cmli.evaluate.embed import EmbedSettings
from ds_cmli.evaluate.report import summary
from ds_cmli.evaluate.split import evaluate_split
from ds_cmli.models.student import Student
from tests.ranks import run


def untrained():
    config = load_preset("tiny", {"run": {"seed": 3}})
    data = build_data(config.data, 0)
    from ds_cmli.engine import build_models

    objective, _ = build_models(config, data.vocab_size)
    return objective, data


def pairs_of(source):
    return build_data(load_preset("tiny", {"data": {"source": str(source)}}).data, 0)


def on_rank(rank, world_size):
    objective, data = untrained()
    dataset = torch.utils.data.Subset(data.evals["seen"], range(11))
    return evaluate_split(objective, dataset, data, EmbedSettings(2, torch.device("cpu")))


def test_ranks_share_the_work_and_agree_with_one_process(monkeypatch):
    expected = on_rank(0, 1)
    for entry in run(on_rank, 3):  # 11 pictures on 3 ranks: shares of 4, 4 and 3
        assert entry == pytest.approx(expected, abs=1e-9)
    # Scored in several blocks: the same again.
    monkeypatch.setattr("ds_cmli.evaluate.retrieval.PICTURES", 4)
    monkeypatch.setattr("ds_cmli.evaluate.retrieval.CAPTIONS", 3)
    assert on_rank(0, 1) == pytest.approx(expected, abs=1e-9)
    assert 0 < expected["pointing_game"] < 1
    assert (expected["pairs"], expected["pictures"]) == (11, 11)
    assert expected["chance/t2i_r5"] == pytest.approx(5 / 11)


def test_training_mode_is_restored():
    objective, data = untrained()
    objective.train()
    evaluate_split(
        objective, torch.utils.data.Subset(data.evals["seen"], range(3)), data, EmbedSettings(4, torch.device("cpu"))
    )
    assert objective.training


CAPTIONS, PICTURES = 3, 5


def folder(path, captions=CAPTIONS):
    """Pictures of one colour each, with several captions."""
    for part in ("train", "validation"):
        (path / part).mkdir(parents=True)
        lines = []
        for k in range(PICTURES):
            Image.new("RGB", (30, 30), (40 * k, 255 - 40 * k, 99)).save(path / part / f"{k}.png")
            lines += [{"file_name": f"{k}.png", "text": f"square {k} {c}"} for c in range(captions)]
        (path / part / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


class Colours:
    """Stands in for the student: embeds a picture by its colour and a caption by the number of its picture."""

    image_embeddings, text_embeddings = Student.image_embeddings, Student.text_embeddings

    def __init__(self, tokenizer, constant=False):
        self.digits = {tokenizer(f"square {k}").input_ids[2]: k for k in range(PICTURES)}
        self.constant, self.grid = constant, (1, 1)

    def encode_image(self, image, grid=None):
        return self._embed((image[:, 0, 0, 0].long() / 40).round().long())

    def encode_text(self, input_ids, attention_mask):
        cls, tokens = self._embed(torch.tensor([self.digits[row[2].item()] for row in input_ids]))
        return cls, tokens.expand(-1, input_ids.shape[1], -1)

    def _embed(self, number):
        cls = torch.nn.functional.one_hot(number * (not self.constant), PICTURES).float()
        return cls, cls[:, None]

    def projection(self, x):
        return x


class Stub(torch.nn.Module):
    def __init__(self, student):
        super().__init__()
        self.student = student

    def score_scales(self):
        return {"cmli": 10.0, "global": 10.0}


def score(source, constant=False):
    data = pairs_of(source)
    stub = Stub(Colours(data.tokenizer, constant))
    return evaluate_split(stub, data.evals["val"], data, EmbedSettings(4, torch.device("cpu")))


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
    text = summary("val", result)
    heading, ways, columns, *rows = text.splitlines()
    assert heading == "  val 15 pairs, 5 pictures" and max(map(len, text.splitlines())) < 80
    assert ways.split() == ["image", "to", "text", "text", "to", "image", "mean"]
    assert columns.split() == ["R@1", "R@5", "R@10"] * 2 + ["recall"]
    # Chance: 3 of 15 captions belong to a picture, one of 5 pictures to a caption.
    assert rows[-1].split()[:2] == ["chance", "0.200"] and rows[-1].split()[4] == "0.200"
    assert len({len(row) for row in rows}) == 1


def break_some(path):
    (path / "validation" / "1.png").write_bytes(b"no picture")
    (path / "validation" / "4.png").unlink()
    with open(path / "validation" / "metadata.jsonl", "a") as file:
        file.write('{"file_name": "0.png", "text": "\\u200b"}\n')
        file.write('{"file_name": "3.png", "text": " "}\n')


def test_what_is_broken_is_left_out_counted_and_named(tmp_path, monkeypatch):
    folder(tmp_path)
    break_some(tmp_path)
    monkeypatch.setattr(Colours, "encode_text", whatever(Colours.encode_text))
    result = score(tmp_path)
    assert set(recalls(result).values()) == {1.0}
    assert (result["pairs"], result["pictures"]) == ((PICTURES - 2) * CAPTIONS, PICTURES - 2)
    assert result["left_out"] == 2 * CAPTIONS + 1  # a blank caption beside others is none
    assert result["chance/t2i_r1"] == pytest.approx(1 / 3)
    lines = " ".join(result["left_out_first"])
    assert "1.png (cannot identify" in lines and "4.png (no such file)" in lines
    assert "0.png (caption without a token)" in lines
    assert "9 pairs, 3 pictures, 7 left out: " in summary("val", result)


def whatever(encode_text):
    """Captions without a token are encoded as any other."""

    def encode(student, input_ids, attention_mask):
        known = next(iter(student.digits))
        ids = input_ids.clone()
        ids[[row for row in range(len(ids)) if ids[row, 2].item() not in student.digits], 2] = known
        return encode_text(student, ids, attention_mask)

    return encode


def counted_on_rank(rank, world_size, path):
    opened = []
    read = Files.image

    def counting(source, index):
        opened.append(source.name(index))
        return read(source, index)

    data = pairs_of(path)
    Files.image = counting
    stub = Stub(Colours(data.tokenizer))
    return evaluate_split(stub, data.evals["val"], data, EmbedSettings(4, torch.device("cpu"))), opened


def test_each_rank_decodes_its_own_share_once_and_all_know_of_what_is_broken(tmp_path):
    folder(tmp_path)
    (tmp_path / "validation" / "1.png").write_bytes(b"no picture")
    results = run(counted_on_rank, 2, tmp_path)  # shares of 3 and 2
    assert sorted(file for _, opened in results for file in opened) == [f"{k}.png" for k in range(PICTURES)]
    assert [len(opened) for _, opened in results] == [3, 2]
    for entry, _ in results:
        assert entry == results[0][0]
        assert set(recalls(entry).values()) == {1.0}
        assert (entry["pairs"], entry["left_out"]) == (12, 3)


def test_nothing_left_is_one_line(tmp_path):
    folder(tmp_path)
    data = pairs_of(tmp_path)
    for file in (tmp_path / "validation").glob("*.png"):
        file.unlink()
    with pytest.raises(UserError, match=r"no pair of the validation set can be used.*0.png \(no such file\)"):
        evaluate_split(Stub(Colours(data.tokenizer)), data.evals["val"], data, EmbedSettings(4, torch.device("cpu")))
