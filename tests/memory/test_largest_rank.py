"""The rank that needs the most is predicted, by what its share of the gradients needs and when."""

import pytest

from ds_cmli.config.presets import load_preset
from ds_cmli.memory.largest_rank import predict_largest
from ds_cmli.memory.predict import predict
from ds_cmli.memory.shares import requested_peak
from tests.memory.random_settings import random_setting

NARROW = {"hidden_size": 160, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 640}


@pytest.mark.slow
def test_a_rank_in_the_middle():
    """The ranks before the last have parts of larger matrices, whose whole gradients they keep."""
    sections = {
        "student": {"text_overrides": NARROW, "layers": 2},
        "teacher": {"block": 0},
        "optim": {"micro_batch": 3},
        "loss": {"weights": {"global": 1.0}},
    }
    config = load_preset("tiny", sections)
    json = {"bf16": {"enabled": True}, "zero_optimization": {"stage": 2, "reduce_bucket_size": 500_000}}
    largest = predict_largest(config, json, 6, target="cpu")
    most, rank = largest.report.totals["requested"], largest.report.setting["rank"]
    last = predict(config, json, 6, target="cpu", rank=5)
    assert rank == 4 and most > 1.01 * last.report.totals["requested"]
    # From the record of either rank follow the events of the other.
    assert abs(requested_peak(last.shares.events(last.events, rank)) - most) <= 16
    of_last = largest.shares.events(largest.events, 5)
    assert abs(requested_peak(of_last) - last.report.totals["requested"]) <= 16


@pytest.mark.slow
def test_ranks_that_do_not_follow_from_each_other_are_all_predicted():
    """Gradients that are not contiguous: what one rank's events say of the others is wrong."""
    config, json, ranks = random_setting(244)
    largest = predict_largest(config, json, ranks, target="cpu")
    last = predict(config, json, ranks, target="cpu", rank=ranks - 1)
    assert largest.report.setting["rank"] == 3
    assert largest.report.totals["requested"] > 1.04 * last.report.totals["requested"]
