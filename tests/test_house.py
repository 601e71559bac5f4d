"""No room has more lines or files than pyproject.toml allows."""

from tests import house


def test_no_room_grows():
    assert house.above(house.measure(), house.limits()) == []
    assert house.above({"ds_cmli/data": [8, 3]}, {"ds_cmli/data": [7, 3]}) == ["ds_cmli/data"]
