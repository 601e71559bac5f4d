"""No figure of the house gets worse."""

from tests import house


def test_no_figure_is_worse_than_its_ratchet():
    assert house.worse(house.measure()[0]) == []
