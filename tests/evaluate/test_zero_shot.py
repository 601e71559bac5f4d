"""Zero-shot classification: scores by loops, accuracies by scikit-learn; folders, names and prompts."""

import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from ds_cmli.config.schema import DataConfig
from ds_cmli.data.tokens import load_tokenizer
from ds_cmli.evaluate.embed import Evaluator
from ds_cmli.evaluate.zero_shot import ClassPictures, classify
from ds_cmli.models.student import Student


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


class Given(torch.nn.Module):
    """Stands in for the objective: a picture's first pixel, and a prompt's second word, is its number."""

    image_embeddings, text_embeddings = Student.image_embeddings, Student.text_embeddings
    projection = torch.nn.Identity()

    def __init__(self, images, texts, tokenizer):
        super().__init__()
        self.images, self.prompts = images, texts
        self.number = {tuple(tokenizer(f"a {c} {t}").input_ids[1:4]): (c, t) for c in range(12) for t in range(4)}
        self.precise = torch.nn.Parameter(torch.zeros(1))

    @property
    def student(self):
        return self

    def score_scales(self):
        return {"global": 5.0, "cmli": 20.0}

    def encode_image(self, image, grid=None):
        number = image[:, 0, 0, 0].long()
        return tuple(part[number] for part in self.images)

    def encode_text(self, input_ids, attention_mask):
        cls, tokens = self.prompts
        rows = [self.number[tuple(ids[1:4].tolist())] for ids in input_ids]
        cls = torch.stack([cls[row] for row in rows])
        # Behind [CLS], of which there is no token.
        padded = torch.zeros(len(rows), input_ids.shape[1], tokens.shape[-1])
        for row, place in enumerate(rows):
            padded[row, 1:4] = tokens[place]
        return cls, padded


@pytest.mark.parametrize("case", range(2))
def test_accuracies_as_scikit_learn_finds_them_on_scores_of_loops(case):
    from sklearn.metrics import accuracy_score, balanced_accuracy_score, top_k_accuracy_score

    draw = np.random.default_rng(case)
    classes, templates, count, d, n = int(draw.integers(6, 12)), int(draw.integers(1, 4)), 30, 5, 4
    cls, patches = draw.normal(size=(count, d)), draw.normal(size=(count, n, d))
    text_cls, tokens = draw.normal(size=(12, 4, d)), draw.normal(size=(12, 4, 3, d))
    target = np.concatenate([np.arange(classes), draw.integers(0, classes, count)])[:count]
    by_global, by_cmli = np.zeros((2, count, classes))
    for c in range(classes):
        by_global[:, c] = unit(cls) @ unit(unit(text_cls[c, :templates]).mean(0))
        for i in range(count):
            found = [unit(patches[i]) @ unit(tokens[c, t]).T for t in range(templates)]
            by_cmli[i, c] = np.mean([similarity.max(1).mean() for similarity in found])
    expected = {"global": by_global, "cmli": by_cmli, "combined": 5 * by_global + 20 * by_cmli}

    words = load_tokenizer("builtin", 8)
    parts = [tuple(torch.tensor(x).float() for x in pair) for pair in ((cls, patches), (text_cls, tokens))]
    pictures = SimpleNamespace(
        names=[str(c) for c in range(classes)],
        templates=[f"a {{}} {t}" for t in range(templates)],
        rows=[(str(number), int(c)) for number, c in enumerate(target)],
        image=lambda number: torch.full((3, 2, 2), number, dtype=torch.uint8),
        view=SimpleNamespace(size=2),
    )
    result = classify(Evaluator(Given(*parts, words), words, torch.device("cpu"), 7), pictures)
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
    os.mkfifo(path / "red_car" / "b.png")  # to open it would block
    return str(path)


def test_a_folder_of_class_folders(tmp_path):
    pictures = ClassPictures(folders(tmp_path / "data"), None, None, DataConfig(image_size=8))
    assert pictures.names == ["blue bird", "red car"] and len(pictures.templates) == 7
    assert [number for _, number in pictures.rows] == [0, 0, 1, 1]
    assert [int(pictures.image(k)[2, 0, 0]) for k in range(4)] == [255, 255, 0, 0]
    names, templates = tmp_path / "names.txt", tmp_path / "templates.txt"
    names.write_text("bird\ncar\n")
    templates.write_text("a {}\n\n{}s\n")
    pictures = ClassPictures(str(tmp_path / "data"), str(names), str(templates), DataConfig())
    assert pictures.names == ["bird", "car"] and pictures.templates == ["a {}", "{}s"]
