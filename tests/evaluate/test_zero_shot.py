import io
import json
import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from ds_cmli.common.errors import UserError
from ds_cmli.config.presets import load_preset
from ds_cmli.config.schema import DataConfig
from ds_cmli.data.pairs import batches
from ds_cmli.data.tokens import load_tokenizer
from ds_cmli.engine import build_models
from ds_cmli.evaluate.embed import EmbedSettings, Texts
from ds_cmli.evaluate.held_out import Picture, collate_pictures
from ds_cmli.evaluate.zero_shot import (
    Classifier,
    ClassPictures,
    build_classifier,
    class_names,
    classify,
    prompt_templates,
)
from ds_cmli.models.student import Student
from tests.ranks import run


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


class Given:
    """Stands in for the student: a picture's first pixel is its number among embeddings that are given."""

    image_embeddings = Student.image_embeddings

    def __init__(self, cls, patches):
        self.cls, self.patches = torch.tensor(cls), torch.tensor(patches)

    def encode_image(self, image, grid=None):
        number = image[:, 0, 0, 0].long()
        return self.cls[number], self.patches[number]

    def projection(self, x):
        return x


class Numbered(torch.utils.data.Dataset):
    def __init__(self, targets):
        self.targets = targets

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, index):
        return Picture(torch.full((3, 2, 2), index, dtype=torch.uint8), index, target=int(self.targets[index]))


@pytest.mark.parametrize("case", range(20))
def test_accuracies_as_scikit_learn_finds_them_on_scores_of_loops(case):
    from sklearn.metrics import accuracy_score, balanced_accuracy_score, top_k_accuracy_score

    draw = np.random.default_rng(case)
    classes, templates, count, d, n = draw.integers(6, 12), draw.integers(1, 4), 30, 5, 4
    cls, patches = draw.normal(size=(count, d)), draw.normal(size=(count, n, d))
    text_cls = unit(draw.normal(size=(classes * templates, d)))
    lengths = draw.integers(1, 5, classes * templates)
    tokens = unit(draw.normal(size=(lengths.sum(), d)))
    target = np.concatenate([np.arange(classes), draw.integers(0, classes, count)])[:count]

    ends = lengths.cumsum()
    by_global, by_cmli = np.zeros((2, count, classes))
    for c in range(classes):
        prompts = range(c * templates, (c + 1) * templates)
        by_global[:, c] = unit(cls) @ unit(np.mean([text_cls[p] for p in prompts], 0))
        for i in range(count):
            result = [unit(patches[i]) @ tokens[ends[p] - lengths[p] : ends[p]].T for p in prompts]
            by_cmli[i, c] = np.mean([similarity.max(1).mean() for similarity in result])
    expected = {"global": by_global, "cmli": by_cmli, "combined": 5 * by_global + 20 * by_cmli}

    numbers = torch.arange(classes * templates)
    places = torch.full((int(lengths.sum()),), -1)
    texts = Texts(numbers, torch.tensor(text_cls).float(), torch.tensor(tokens), places, torch.tensor(lengths))
    classifier = Classifier(texts, int(templates), {"global": 5.0, "cmli": 20.0})
    loader = batches(Numbered(target), 7, 0, collate_pictures)
    result = classify(Given(cls.astype("float32"), patches), loader, classifier, EmbedSettings(7, torch.device("cpu")))
    assert (result["pictures"], result["classes"]) == (count, classes)
    for name, scores in expected.items():
        best = scores.argmax(1)
        assert result[f"{name}/top1"] == pytest.approx(accuracy_score(target, best))
        assert result[f"{name}/top5"] == pytest.approx(top_k_accuracy_score(target, scores, k=5, labels=range(classes)))
        assert result[f"{name}/mean_per_class"] == pytest.approx(balanced_accuracy_score(target, best))


def folders(path):
    for name, colour in (("blue_bird", "blue"), ("red_car", "red")):
        (path / name).mkdir(parents=True)
        for k in range(2):
            Image.new("RGB", (30, 20), colour).save(path / name / f"{k}.png")
    (path / "red_car" / "1.png").write_bytes(b"no picture")
    return path


def test_a_folder_of_class_folders(tmp_path):
    pictures = ClassPictures(str(folders(tmp_path / "data")), DataConfig(image_size=8))
    assert pictures.folders == ["blue_bird", "red_car"] and len(pictures) == 4
    result = [pictures.pictures(range(4))[k] for k in range(4)]
    assert [p.target for p in result if p.bad is None] == [0, 0, 1]
    assert [int(p.image[2, 0, 0]) for p in result] == [255, 255, 0, 0]
    assert result[3].bad[0] == "1.png" and result[3].bad[1].startswith("cannot identify image file")
    assert class_names(pictures.folders, None) == ["blue bird", "red car"]


@pytest.mark.parametrize("broken", [False, True])
def test_a_hugging_face_data_set_with_labels(tmp_path, monkeypatch, broken):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    colours = [(200, 0, 0), (0, 0, 200), (200, 0, 0)]
    files = []
    for colour in colours:
        Image.new("RGB", (8, 8), colour).save(buffer := io.BytesIO(), "PNG")
        files.append(buffer.getvalue())
    if broken:
        files[1] = files[1][:20]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["red", "dark_blue"])})
    rows = {"image": [{"bytes": file, "path": None} for file in files], "label": [0, 1, 0]}
    (tmp_path / "set").mkdir()
    datasets.Dataset.from_dict(rows, features).to_parquet(tmp_path / "set" / "validation-00000-of-00001.parquet")

    result = ClassPictures(f"hfds/{tmp_path / 'set'}", DataConfig(image_size=4))
    assert result.folders == ["red", "dark_blue"] and class_names(result.folders, None) == ["red", "dark blue"]
    pictures = list(result.pictures([0, 1, 2]))
    assert [picture.target for picture in pictures if picture.bad is None] == ([0, 0] if broken else [0, 1, 0])
    assert (pictures[1].bad is not None) == broken
    for picture, colour in zip(pictures, colours, strict=True):
        if picture.bad is None:
            assert picture.image[:, 2, 2].tolist() == list(colour)
    if broken:
        assert pictures[1].bad[0] == "picture 1"  # it has no file name


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("names.txt", "bird\n", "with 1 names: there are 2 classes"),
        ("names.json", json.dumps({"blue_bird": "bird"}), "it has no name for 'red_car'"),
        ("names.json", "{", "cannot be read"),
        ("names.json", "7", "a list of names"),
        ("names.json", "[1, 2]", "a list of names"),
        ("names.json", '{"blue_bird": "a", "red_car": 3}', "it has no name for 'red_car'"),
        ("names.json", "[" * 10_000, "nested too deeply"),
        ("templates.txt", "a photo\n", "with the line 'a photo': write {} once"),
        ("templates.txt", "\n", "with the line ''"),
    ],
)
def test_mistakes_in_names_and_templates_are_one_line(tmp_path, name, content, words):
    file = tmp_path / name
    file.write_text(content)
    with pytest.raises(UserError) as error:
        if "templates" in name:
            prompt_templates(str(file))
        else:
            class_names(["blue_bird", "red_car"], str(file))
    assert words in str(error.value) and "\n" not in str(error.value)


def test_pictures_none_of_which_can_be_read_are_one_line(tmp_path):
    for folder in ("red", "blue"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.png").write_bytes(b"no picture")
        os.mkfifo(tmp_path / folder / "b.png")  # to open it would block
    pictures = ClassPictures(str(tmp_path), DataConfig(image_size=8))
    reasons = {picture.bad[1] for picture in map(pictures.pictures(range(4)).__getitem__, range(4))}
    assert any("no regular file" in reason for reason in reasons) and len(reasons) > 1
    texts = Texts(
        torch.arange(2), torch.ones(2, 1), torch.ones(2, 1), torch.zeros(2, dtype=torch.long), torch.ones(2).long()
    )
    broken = [replace(pictures.pictures([n])[0], image=torch.full((3, 2, 2), n, dtype=torch.uint8)) for n in range(4)]
    given = Given(np.ones((4, 1), np.float32), np.ones((4, 1, 1), np.float32))
    with pytest.raises(UserError, match=r"--zero-shot: no picture can be read, for instance .*a\.png"):
        classify(
            given,
            [collate_pictures(broken)],
            Classifier(texts, 1, {"global": 1.0}),
            EmbedSettings(2, torch.device("cpu")),
        )


def test_what_is_no_folder_of_classes_is_one_line(tmp_path):
    (tmp_path / "empty").mkdir()
    for source, words in (
        ("/nowhere", "give a folder that has a folder"),
        (str(tmp_path / "empty"), "timm cannot read"),
    ):
        with pytest.raises(UserError, match=words):
            ClassPictures(source, DataConfig(image_size=8))


def classes_of_rank(rank, world):
    """Embeddings of five classes, whose ten prompts three ranks share unevenly."""
    torch.manual_seed(0)
    config, words = load_preset("tiny", {}), load_tokenizer("builtin", 32)
    objective, _ = build_models(config, words.vocab_size)
    how = EmbedSettings(2, torch.device("cpu"))
    classifier = build_classifier(objective.eval(), words, list("abcde"), ["a {}", "the {}"], how)
    return classifier.cls, classifier.texts.tokens


def test_ranks_share_the_prompts_and_lose_none():
    [one], several = run(classes_of_rank, 1), run(classes_of_rank, 3)
    for of_rank in several:
        for entry, expected in zip(of_rank, one, strict=True):
            torch.testing.assert_close(entry, expected)
