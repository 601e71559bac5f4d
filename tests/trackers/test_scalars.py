"""Each column of a run has its group in TensorBoard."""

import pytest

from ds_cmli.trackers import tag


@pytest.mark.parametrize(
    "name, expected",
    [
        ("loss", "loss/total"),
        ("loss/cmli", "loss/cmli"),
        ("eval/seen/combined/i2t_r1", "retrieval/seen/combined/i2t_r1"),
        ("eval/val/pointing_game", "pointing-game/val"),
        ("lr", "optimizer/lr"),
        ("time/forward", "speed/time/forward"),
        ("mfu", "speed/mfu"),
        ("peak_memory_bytes", "memory/peak_memory_bytes"),
        ("temperature/global", "temperature/global"),
    ],
)
def test_each_scalar_has_its_group(name, expected):
    assert tag(name) == expected
