"""Folders of classes, with published names and prompts, against accuracies computed one picture at a time."""

import builtins
import json

import numpy as np
import open_clip
import pytest
import torch

from ds_cmli.cmli.reference import cmli_scores_reference
from ds_cmli.common.errors import UserError
from ds_cmli.evaluate.model import EvaluatedModel, PictureFile
from ds_cmli.evaluate.suites import class_texts
from tests.evaluate.suites import dense_data as data
from tests.evaluate.suites.lists import picture
from tests.run_folder import write_run


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return EvaluatedModel.load(str(write_run(tmp_path_factory.mktemp("run"))), 3, 0)


def folders(path, *names):
    for number, name in enumerate(names):
        for k in range(number + 1):
            picture(path / name / f"{k}.png", 10 * number + k)
    return {"kind": "classification", "data": str(path)}


def test_accuracies_by_loops(tmp_path, model):
    names = ["black_cat", "blue_bird", "old_car", "red_apple", "tall_tree", "warm_sea"]
    task = data.task(tmp_path, folders(tmp_path / "val", *names))
    assert task.names == [name.replace("_", " ") for name in names]
    texts = [[model.texts([prompt.replace("{}", name)]) for prompt in data.PROMPTS] for name in task.names]
    hits = {(kind, top): [] for kind in ("global", "cmli", "combined") for top in (1, 5)}
    targets = []
    for target, name in enumerate(names):
        for k in range(target + 1):
            images = model.images([PictureFile(tmp_path / "val" / name / f"{k}.png")])
            scores = {"global": [], "cmli": []}
            for of_class in texts:
                mean = np.mean([text.cls[0].numpy() for text in of_class], 0)
                scores["global"].append(images.cls[0].numpy() @ mean / np.linalg.norm(mean))
                of_prompts = []
                for text in of_class:
                    mask = torch.ones(1, len(text.tokens), dtype=torch.bool)
                    i2t, _ = cmli_scores_reference(images.patches.float(), text.tokens[None].float(), mask)
                    of_prompts.append(i2t.item())
                scores["cmli"].append(np.mean(of_prompts))
            scores["combined"] = sum(model.scales[kind] * np.array(scores[kind]) for kind in ("global", "cmli"))
            targets.append(target)
            for kind, top in hits:
                hits[kind, top].append(target in np.argsort(-np.array(scores[kind]))[:top])
    measured = task.run(model)
    assert measured.samples == 21 and measured.figures == {"classes": 6, "chance/top1": 1 / 6, "chance/top5": 5 / 6}
    for (kind, top), of_kind in hits.items():
        assert measured.measures[f"{kind}/top{top}"].value == pytest.approx(np.mean(of_kind))
        if top == 1:
            by_class = [np.mean([hit for hit, t in zip(of_kind, targets, strict=True) if t == c]) for c in range(6)]
            assert measured.measures[f"{kind}/mean_per_class"].value == pytest.approx(np.mean(by_class))


def test_imagenets_folders_have_the_published_names(tmp_path):
    task = data.task(
        tmp_path, folders(tmp_path / "val", "n01440764", "n01443537", "n15075141") | {"templates": "openai"}
    )
    assert task.names == ["tench", "goldfish", "toilet paper"]
    assert class_texts.imagenet_names([str(number) for number in range(1000)]) == list(open_clip.IMAGENET_CLASSNAMES)
    assert class_texts.imagenet_names(["n01440764", "cat"]) is None
    assert class_texts.imagenet_names([str(number) for number in range(10)]) is None


def test_eighty_prompts_and_seven():
    eighty, seven = class_texts.prompts("openai"), class_texts.prompts("seven")
    assert len(eighty) == 80 and len(seven) == 7 and set(seven) < set(eighty)
    for prompt, published in zip(eighty, open_clip.OPENAI_IMAGENET_TEMPLATES, strict=True):
        assert prompt.replace("{}", "tench") == published("tench")


def test_names_of_a_file(tmp_path):
    settings = folders(tmp_path / "val", "a", "b")
    (tmp_path / "names.txt").write_text("dog\ncat\n")
    assert data.task(tmp_path, settings | {"classes": "names.txt"}).names == ["dog", "cat"]
    (tmp_path / "names.json").write_text(json.dumps({"a": "dog", "b": "cat"}))
    assert data.task(tmp_path, settings | {"classes": "names.json"}).names == ["dog", "cat"]


@pytest.mark.parametrize(
    ("change", "settings", "words"),
    [
        ("", {"classes": "one.txt"}, "one.txt', with 1 names: there are 2 classes"),
        ("", {"classes": "one.json"}, "one.json': it has no name for 'b'"),
        ("", {"data": "empty"}, "empty', which timm cannot read"),
        ("", {"data": "one.txt"}, "one.txt', which timm cannot read"),
        ("", {"data": "none"}, "task.data is 'none': no such file or folder"),
        ("no picture", {}, "the picture 0.png cannot be read (cannot identify image file"),
    ],
)
def test_mistakes_are_one_line(tmp_path, model, change, settings, words):
    given = folders(tmp_path / "val", "a", "b") | settings
    (tmp_path / "empty").mkdir()
    (tmp_path / "one.txt").write_text("dog")
    (tmp_path / "one.json").write_text('{"a": "dog"}')
    if change:
        (tmp_path / "val" / "b" / "0.png").write_text(change)
    with pytest.raises(UserError) as error:
        data.task(tmp_path, given).run(model)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_without_open_clip_one_line_says_what_to_install(tmp_path, monkeypatch):
    real = builtins.__import__

    def absent(name, *more, **named):
        if name == "open_clip":
            raise ImportError(name)
        return real(name, *more, **named)

    monkeypatch.setattr(builtins, "__import__", absent)
    for settings in ({"templates": "openai"}, {"data": str(tmp_path / "imagenet")}):
        folders(tmp_path / "imagenet", "n01440764", "n01443537")
        with pytest.raises(UserError, match=r'pip install "ds-cmli\[open_clip\]", or give templates="seven"'):
            data.task(tmp_path, folders(tmp_path / "val", "a", "b") | settings)
    assert data.task(tmp_path, folders(tmp_path / "val", "a", "b") | {"templates": "seven"}).names == ["a", "b"]
