"""Retrieval with long captions and with several, against ranks counted one by one."""

import json

import pytest
import torch

from ds_cmli.evaluate.model import PictureFile
from ds_cmli.evaluate.suites.compare import run_suite
from ds_cmli.evaluate.suites.suite import read_suite
from tests.evaluate.suites import lists
from tests.evaluate.suites.test_choices import KINDS, Scores, values


def recalls(score, pairs):
    """Recall at 1, 5 and 10 of lists of (file, caption), without ties."""
    files, texts = list(dict.fromkeys(file for file, _ in pairs)), [text for _, text in pairs]
    out = {}
    for k in (1, 5, 10):
        found = 0
        for file in files:
            best = sorted(texts, key=lambda text, file=file: -score.i2t(file, text))[:k]
            found += any((file, text) in pairs for text in best)
        out[f"i2t_r{k}"] = found / len(files)
        found = 0
        for file, text in pairs:
            found += file in sorted(files, key=lambda other, text=text: -score.t2i(other, text))[:k]
        out[f"t2i_r{k}"] = found / len(texts)
    return {**out, "mean_recall": sum(out.values()) / 6}


def expected_pairs(folder, write):
    if write is lists.docci:
        rows = map(json.loads, (folder / "docci_descriptions.jsonlines").read_text().splitlines())
        return [(folder / "images" / r["image_file"], r["description"]) for r in rows if r["split"] == "test"]
    if write is lists.dci:
        rows = [json.loads(file.read_text()) for file in sorted((folder / "annotations").iterdir())]
        texts = [f"{r['short_caption']}\n{r['extra_caption']}".strip() for r in rows]
        return [(folder / "photos" / r["image"], text) for r, text in zip(rows, texts, strict=True)]
    if write is lists.iiw:
        pairs = []
        for name in ("IIW-400", "DCI_Test"):
            for row in map(json.loads, (folder / name / "data.jsonl").read_text().splitlines()):
                file = row.get("image/key") or row["image"]
                pairs.append((folder / name / "photos" / f"{file.removesuffix('.jpg')}.jpg", row["IIW"]))
        return pairs
    if write is lists.urban1k:
        files = sorted((folder / "caption").iterdir())
        return [(folder / "image" / f"{f.stem}.jpg", f.read_text().splitlines()[0]) for f in files]
    rows = json.loads((folder / "share-captioner.json").read_text())[:8]
    return [(folder / r["image"], r["conversations"][1]["value"].replace("\n", " ")) for r in rows]


@pytest.mark.parametrize("write", lists.LONG, ids=lambda write: write.__name__)
def test_long_captions(tmp_path, model, write):
    result = read_suite(lists.write_suite(tmp_path, task=write(tmp_path)))["task"].run(model)
    pairs = expected_pairs(tmp_path, write)
    assert result.samples == len(pairs) == 8
    score = Scores(model)
    for kind in KINDS:
        assert values(result, kind) == pytest.approx(recalls(score.of(kind), pairs))
    backend = model.tokenizer.backend
    backend.no_truncation()
    long = sum(len(backend.encode(text).ids) > model.tokenizer.positions for _, text in pairs)
    backend.enable_truncation(model.tokenizer.positions)
    assert result.figures["truncated"] == long > 0
    assert result.notes == [f"{long} of 8 captions have more than 32 tokens: the rest of them is not read"]
    assert result.figures["chance/i2t_r1"] == pytest.approx(1 / 8)


def test_retrieval_with_several_captions(tmp_path, model):
    result = read_suite(lists.write_suite(tmp_path, task=lists.retrieval(tmp_path)))["task"].run(model)
    images = json.loads((tmp_path / "dataset.json").read_text())["images"][1:]
    pairs = [(tmp_path / "photos" / i["filename"], s["raw"]) for i in images for s in i["sentences"]]
    assert result.samples == 6 and result.figures["pairs"] == len(pairs) == 12
    score = Scores(model)
    for kind in KINDS:
        assert values(result, kind) == pytest.approx(recalls(score.of(kind), pairs))
    # A picture is drawn with all of its captions.
    times = torch.zeros(6, 1, dtype=torch.float64)
    times[1] = 3
    measure = result.measures["global/t2i_r1"]
    assert measure.resampled(times).item() == pytest.approx(float(measure.hits[1] / measure.counts[1]))


def test_the_pointing_game(tmp_path, model):
    from ds_cmli.evaluate.pointing_game import Entities, pointing_game

    result = read_suite(lists.write_suite(tmp_path, task=lists.pointing_game(tmp_path)))["task"].run(model)
    images = str(tmp_path / "flickr30k-images")
    entities = Entities(str(tmp_path), images, "test", model.tokenizer, model.config.data)
    expected = pointing_game(model.objective.student, entities, model.how)
    assert result.measures["cmli/pointing_game"].value == expected["pointing_game"]
    assert result.figures["chance/pointing_game"] == pytest.approx(expected["chance/pointing_game"])
    assert result.samples == 6


@pytest.mark.parametrize("write", [*lists.LONG, lists.sugarcrepe, lists.mmvp], ids=lambda write: write.__name__)
def test_a_damaged_picture_is_named(tmp_path, model, write):
    task = write(tmp_path)
    file = next(file for file in sorted(tmp_path.rglob("*")) if file.suffix in (".jpg", ".png"))
    file.write_bytes(file.read_bytes()[:60])
    other = lists.winoground(tmp_path)
    tasks = read_suite(lists.write_suite(tmp_path, task=task, other=other))
    results, [problem] = run_suite(tasks, ["model"], lambda name: model)
    assert [*results] == ["other"]
    assert problem.startswith("--suite: task: ") and file.name in problem
    assert "fetch" in problem and "\n" not in problem
    assert PictureFile(file) == PictureFile(file, None)
