"""The arithmetic of the endpoints; profiling/ablate.py's test measures a run."""

from types import SimpleNamespace

import pytest
import torch

from ds_cmli.data.demo_pictures import DemoPictures
from ds_cmli.data.scenes import Scenes
from ds_cmli.data.tokens import load_tokenizer
from profiling.learning.endpoints import Endpoints, own_preferred, probe_accuracy, word_classes


def test_a_scene_hits_by_its_rank_and_a_tie_is_no_hit():
    # Row 0: its own is best. Row 1: one better. Row 2: a tie. Row 3: its own is NaN.
    i2t = torch.tensor([[9.0, 1, 1, 1], [5, 4, 1, 1], [1, 1, 3, 3], [1, 1, 1, torch.nan]])
    best = torch.eye(4)
    endpoints = SimpleNamespace(scores=lambda share: (i2t, best))
    share = SimpleNamespace(texts=SimpleNamespace(number=torch.arange(4)))
    result = Endpoints.retrieval(endpoints, share)
    # Three of each way at most; among four candidates those at 5 and 10 are always hit.
    assert result.hits == "6555" and result.mean_recall == pytest.approx((6 + 5 + 5 + 5) / 24)


def test_own_preferred():
    scores = torch.tensor([[2.0, 1, 9, 9], [1, 1, 9, 9], [9, 9, 1, 2], [9, 9, 3, 4]])
    assert own_preferred(scores) == (1 + 0.5 + 0 + 1) / 4


def test_the_probe_finds_what_is_linear_and_not_what_is_not_there():
    generator = torch.Generator().manual_seed(0)
    features = torch.nn.functional.normalize(torch.randn(400, 8, generator=generator, dtype=torch.float64))
    assert probe_accuracy(features, (features[:, 0] > 0).long(), 300) > 0.9
    noise = torch.randint(0, 4, (400,), generator=generator)
    assert probe_accuracy(features, noise, 300) < 0.45


def test_the_classes_of_words():
    scenes = Scenes("unseen", 0, 1, DemoPictures(56), load_tokenizer("builtin", 64), "sentences")
    caption = "a picture of red heart and farmer"
    scenes.caption = lambda index: (caption, [(13, 22), (27, 33)])
    scenes.pair = lambda index: SimpleNamespace(tokens=scenes.tokenizer(caption))
    classes, tokens = word_classes(scenes, 0), scenes.tokenizer(caption)
    ends = [end for end, valid in zip(tokens.ends, tokens.valid, strict=True) if valid]
    by_word = {caption[:end].rsplit(" ", 1)[-1]: kind for end, kind in zip(ends, classes, strict=True)}
    assert by_word["red"] == "attribute" and by_word["heart"] == "head" and by_word["farmer"] == "head"
    assert by_word["and"] == "other"


@pytest.mark.parametrize("wrong, miou", [(0, 1.0), (1, (0 + 0 + 1 / 2 + 0) / 4)])
def test_the_patches_of_a_scene_are_its_names(wrong, miou, monkeypatch):
    """One scene of 2 x 2 patches: concepts 2, 4 and 6 of 1, 2, 4 and 6, which are held out, and an empty quarter.

    Wrong: the patch of 2 is of 1, which adds 1, and that of 6 of 4, which leaves 4 with one of two.
    """
    held_out = [1, 2, 4, 6]
    layout = [(2, 0), (4, 1), (6, 3)]
    classes = [0, 2, 1, 2] if wrong else [1, 2, 0, 3]
    patches = torch.eye(4)[torch.tensor(classes)]
    cells = torch.tensor([[[0, 1], [-1, 2]]])
    images = SimpleNamespace(cell_picture=cells, square=(2, 2), patches_of=lambda row: patches)
    model = SimpleNamespace(config=None, objective=None, tokenizer=None, device="cpu")
    endpoints = SimpleNamespace(
        model=model,
        unseen=SimpleNamespace(images=images),
        pictures=SimpleNamespace(names=list("abcdefg"), held_out=held_out),
        scenes=lambda *_: SimpleNamespace(layout=lambda _: layout),
    )

    def vectors(_, names, prompts):
        assert names == ["b", "c", "e", "g"] and prompts == ["{}"]
        return {"global": torch.eye(4)}

    monkeypatch.setattr("profiling.learning.endpoints.class_vectors", vectors)
    assert Endpoints.segmentation(endpoints) == pytest.approx(miou)
