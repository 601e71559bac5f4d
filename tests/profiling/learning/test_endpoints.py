"""The arithmetic of the endpoints; profiling/ablate.py's test measures a run."""

from types import SimpleNamespace

import pytest
import torch

from ds_cmli.data.scenes import DemoPictures, Scenes
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
