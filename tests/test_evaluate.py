import math

import pytest
import torch

from ds_cmli.config.presets import load_preset
from ds_cmli.data import build_data
from ds_cmli.engine import build_models
from ds_cmli.evaluate import evaluate, recall
from tests.conftest import spawn


def metrics(i2t, t2i=None):
    i2t = torch.tensor(i2t)
    n = len(i2t)
    t2i = i2t if t2i is None else torch.tensor(t2i)
    return recall((i2t, t2i), torch.arange(n), torch.ones(n, dtype=torch.bool))


def test_recall_by_hand():
    # Image 0 finds its text first, image 1 second; text 0 finds its image first, text 1 first.
    found = metrics([[3.0, 1.0], [2.0, 1.5]])
    assert (found["i2t_r1"], found["i2t_r5"]) == (0.5, 1.0)
    assert found["t2i_r1"] == 1.0


def test_recall_takes_rows_and_columns_from_their_own_scores():
    found = metrics([[1.0, 0.0], [0.0, 1.0]], [[0.0, 1.0], [1.0, 0.0]])
    assert (found["i2t_r1"], found["t2i_r1"]) == (1.0, 0.0)


@pytest.mark.parametrize("value", [0.5, math.nan])
def test_scores_that_say_nothing_retrieve_nothing(value):
    found = metrics([[value] * 12] * 12)
    assert set(found.values()) == {0.0}


def untrained():
    config = load_preset("tiny", {"run": {"seed": 3}})
    data = build_data(config.data, 0)
    objective, _ = build_models(config, data.vocab_size)
    return objective, torch.utils.data.Subset(data.evals["seen"], range(11)), data


def on_rank(rank, world_size):
    objective, dataset, data = untrained()
    return evaluate(objective, dataset, data, 2, torch.device("cpu"))


def test_ranks_share_the_work_and_agree_with_one_process(monkeypatch):
    expected = on_rank(0, 1)
    for found in spawn(on_rank, 3):  # 11 pairs on 3 ranks: shares of 4, 4 and 3
        assert found == pytest.approx(expected, abs=1e-9)
    # Texts held in several chunks: the same again.
    monkeypatch.setattr("ds_cmli.evaluate.CHUNK", 4)
    assert on_rank(0, 1) == pytest.approx(expected, abs=1e-9)
    assert 0 < expected["pointing"] < 1


def test_training_mode_is_restored():
    objective, dataset, data = untrained()
    objective.train()
    evaluate(objective, dataset, data, 4, torch.device("cpu"))
    assert objective.training
