"""Suites on what training may start from: the scores of transformers' own models, and exports."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

from ds_cmli.evaluate.model import EvaluatedModel
from ds_cmli.evaluate.suites.choices import question_scores
from ds_cmli.evaluate.suites.suite import read_suite
from tests.evaluate.suites import lists
from tests.evaluate.suites.test_choices import values
from tests.export.conftest import export
from tests.models import dual_models


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_winoground_by_the_library(tmp_path, kind):
    (tmp_path / kind).mkdir()
    folder = getattr(dual_models, kind)(tmp_path / kind)
    task = read_suite(lists.write_suite(tmp_path, task=lists.winoground(tmp_path)))["task"]
    ours = EvaluatedModel.load(str(folder), 4, 0)
    result, scores = values(task.run(ours), "global"), question_scores(ours, task.questions)["global"].i2t

    model = AutoModel.from_pretrained(folder).eval()
    pictures, tokenizer = AutoImageProcessor.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    padding = {"padding": "max_length", "max_length": 64} if kind == "siglip" else {"padding": True}
    sums = dict.fromkeys(("text", "image", "group"), 0)
    rows = list(map(json.loads, (tmp_path / "examples.jsonl").read_text().splitlines()))
    for row, own in zip(rows, scores, strict=True):
        images = [Image.open(tmp_path / "images" / f"{row[f'image_{k}']}.png").convert("RGB") for k in (0, 1)]
        inputs = tokenizer([row["caption_0"], row["caption_1"]], return_tensors="pt", **padding)
        inputs.pop("token_type_ids", None)
        if kind == "siglip":  # attends to padding
            del inputs["attention_mask"]
        with torch.no_grad():
            out = model(**inputs, **pictures(images, return_tensors="pt"))
        s = out.image_embeds @ out.text_embeds.t()
        assert torch.allclose(own, s, atol=1e-5)
        text = bool(s[0, 0] > s[0, 1] and s[1, 1] > s[1, 0])
        image = bool(s[0, 0] > s[1, 0] and s[1, 1] > s[0, 1])
        sums["text"] += text
        sums["image"] += image
        sums["group"] += text and image
    assert result == pytest.approx({name: count / len(rows) for name, count in sums.items()})


def test_pictures_of_any_aspect(tmp_path):
    (tmp_path / "naflex").mkdir()
    model = EvaluatedModel.load(str(dual_models.naflex(tmp_path / "naflex")), 3, 0)
    tasks = {"a": lists.vg_relation(tmp_path), "b": lists.urban1k(tmp_path), "c": lists.winoground(tmp_path / "c")}
    tasks["c"] |= {"file": "c/examples.jsonl", "images": "c/images"}
    for task in read_suite(lists.write_suite(tmp_path, **tasks)).values():
        result = task.run(model)
        assert {name.split("/")[0] for name in result.measures} == {"global", "cmli", "combined"}


def test_an_export_has_the_results_of_its_run(tmp_path, run, model):
    export(Path(run), tmp_path / "export")
    exported = EvaluatedModel.load(str(tmp_path / "export"), 16, 0)
    for write in (lists.winoground, lists.docci):
        task = read_suite(lists.write_suite(tmp_path, task=write(tmp_path)))["task"]
        first, second = task.run(model).measures, task.run(exported).measures
        assert {name: m.value for name, m in first.items()} == {name: m.value for name, m in second.items()}
