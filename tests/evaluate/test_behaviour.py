"""Scores, recall, accuracies and the pointing game by hand, and what a folder of classes is."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ds_cmli.config.schema import DataConfig
from ds_cmli.evaluate import measures
from ds_cmli.evaluate.embed import Embedded, Embedding
from ds_cmli.evaluate.pointing_game import pointing_game, scene_regions
from ds_cmli.evaluate.summary import summary
from ds_cmli.evaluate.zero_shot import ClassPictures
from ds_cmli.scores import all_kinds
from tests import make

COSINES = torch.tensor([[0.5, 0.1]])
I2T = torch.tensor([[0.25, 0.75]])
T2I = torch.tensor([[0.5, 0.125]])


@pytest.mark.parametrize(
    ("scales", "i2t", "t2i"),
    [
        ({"global": 10.0, "cmli": 4.0}, [[6.0, 4.0]], [[7.0, 1.5]]),
        ({"cmli": 4.0}, [[1.0, 3.0]], [[2.0, 0.5]]),
        ({"global": 10.0}, [[5.0, 1.0]], [[5.0, 1.0]]),
        ({}, [[0.5, 0.1]], [[0.5, 0.1]]),  # a distillation alone has no temperature
    ],
)
def test_each_direction_takes_its_own_cmli_and_only_what_was_trained(scales, i2t, t2i):
    result = all_kinds(COSINES, (I2T, T2I), scales)
    assert list(result) == ["global", "cmli", "combined"]
    torch.testing.assert_close(result["combined"].i2t, torch.tensor(i2t))
    torch.testing.assert_close(result["combined"].t2i, torch.tensor(t2i))
    assert torch.equal(result["cmli"].i2t, I2T) and torch.equal(result["cmli"].t2i, T2I)


def recall(rows: list) -> dict[str, float]:
    """Return the recalls of equal scores both ways; column n is the caption of picture n."""
    scores = torch.tensor(rows)
    return measures.recalls(scores, scores, torch.arange(scores.shape[1]))


def test_a_tie_is_a_random_order():
    assert recall([[1.0] * 4] * 4)["i2t_r1"] == pytest.approx(0.25)
    scores = [[1.0, 1.0, 0.0, 0.0], [0.0, 2.0, 0.0, 0.0], [5.0, 5.0, 4.0, 0.0], [1.0, 2.0, 3.0, 3.0]]
    assert recall(scores)["i2t_r1"] == pytest.approx((0.5 + 1 + 0 + 0.5) / 4)


def test_what_is_no_number_finds_nothing():
    scores = [[float("nan"), 1.0], [0.0, 1.0]]
    assert recall(scores)["i2t_r1"] == 0.5
    assert recall([[float("nan")] * 2] * 2)["i2t_r1"] == 0


def recall_by_sorting(i2t, t2i, image_of, k):
    """Sort, and look for an own one among the first k, as COCO's evaluations do."""
    order = np.argsort(-i2t, axis=1)[:, :k]
    image_recall = np.mean([(image_of[order[i]] == i).any() for i in range(len(i2t))])
    order = np.argsort(-t2i, axis=0)[:k]
    return image_recall, np.mean([image_of[j] in order[:, j] for j in range(len(image_of))])


@pytest.mark.parametrize("case", range(5))
def test_recall_as_by_sorting(case):
    draw = np.random.default_rng(case)
    m = int(draw.integers(2, 8)) * 2
    image_of = draw.permutation(np.concatenate([np.arange(m), draw.integers(0, m, draw.integers(0, 3 * m))]))
    i2t, t2i = draw.normal(size=(2, m, len(image_of)))
    i2t[np.arange(m)[:, None] == image_of] += draw.uniform(0, 2)
    recalls_by_name = measures.recalls(torch.tensor(i2t), torch.tensor(t2i), torch.tensor(image_of))
    for k in measures.RECALLS:
        recalls = recalls_by_name[f"i2t_r{k}"], recalls_by_name[f"t2i_r{k}"]
        assert recalls == pytest.approx(recall_by_sorting(i2t, t2i, image_of, k))


def test_constant_scores_are_worth_chance_and_a_picture_without_a_caption_is_a_candidate_alone():
    image_of = torch.arange(60) // 5
    constant = torch.full((12, 60), 0.5)
    recalls_by_name = measures.recalls(constant, constant, image_of)
    assert recalls_by_name == pytest.approx(measures.chance_recalls(image_of))
    for k in measures.RECALLS:
        drawn = 1 - math.comb(55, k) / math.comb(60, k)
        assert (recalls_by_name[f"i2t_r{k}"], recalls_by_name[f"t2i_r{k}"]) == pytest.approx((drawn, k / 12))
    # Caption 0 finds picture 2, which has none, before its own.
    recalls_by_name = recall([[2.0, 0.5], [0.0, 1.0], [3.0, 0.0]])
    assert (recalls_by_name["i2t_r1"], recalls_by_name["t2i_r1"], recalls_by_name["t2i_r5"]) == (1.0, 0.5, 1.0)


def test_accuracies_by_class_weigh_classes_alike():
    scores = torch.eye(6)[[0, 0, 0, 1, 2]]
    target = torch.tensor([0, 0, 0, 1, 5])
    accuracies = measures.mean_accuracies(measures.top_hits(scores[None], target)[:, 0], target)
    assert accuracies["top1"] == pytest.approx(4 / 5) and accuracies["mean_per_class"] == pytest.approx(2 / 3)
    # The wrong class 2 has 1, and of the right one and four others with 0 four more are among the first five.
    assert accuracies["top5"] == pytest.approx((4 + 0.8) / 5)


def test_hits_of_phrases():
    """Patches are in four rows and two columns: the first two of the first column lie in the box."""
    patches = torch.eye(8)
    tokens = torch.eye(8)[[2, 3, 7, 5]]
    in_box = measures.patches_inside([(0.0, 0.0, 40.0, 40.0)], (0.0, 0.0, 80.0, 80.0), (4, 2))
    assert in_box.nonzero().flatten().tolist() == [0, 2]
    is_hit = measures.phrase_hits(patches, tokens, torch.tensor([0, 1, 1, -1]), in_box.repeat(2, 1))
    assert is_hit.tolist() == [True, False]


def test_a_token_of_a_scene_hits_in_the_quarter_of_its_picture():
    """Pictures 0 and 1 in the first and the last quarter; each token's best patch is one of 4 x 4."""
    scenes = SimpleNamespace(places=lambda row: ([0, 0, 1, -1], [0, -1, -1, 1]))
    texts = {0: Embedding(torch.ones(1), torch.eye(16)[[5, 2, 10, 0]])}
    images = {0: Embedding(torch.ones(1), torch.eye(16))}
    embedded = Embedded(scenes, [0], images, texts, [0], {})
    figures = pointing_game(embedded, scene_regions, (4, 4))
    assert figures == {"pointing_game": 2 / 3, "chance/pointing_game": 0.25, "visible": 1.0, "phrases": 3}


def test_names_and_prompts_of_classes(tmp_path):
    make.pictures(tmp_path, "blue_bird/0.png", "red_car/0.png")
    names = tmp_path / "names.txt"
    templates = tmp_path / "templates.txt"
    names.write_text("bird\ncar\n")
    templates.write_text("a {}\n\n{}s\n")
    pictures = ClassPictures(str(tmp_path), DataConfig(), str(names), str(templates))
    assert pictures.names == ["bird", "car"] and pictures.templates == ["a {}", "{}s"]


def test_one_thing_is_counted_in_the_singular():
    assert summary({"pairs": 1, "pictures": 1, "classes": 1}, "fp32") == "  1 pair, 1 picture, 1 class, in fp32"
    assert summary({"pairs": 2, "choices": 0}, "fp32") == "  2 pairs, 0 choices, in fp32"
