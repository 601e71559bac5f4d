"""No room is above its limit, and the mutants are of the package as it is."""

from tests import house
from tests.mutations import MUTANTS, ROOT, mutated


def test_no_room_grows():
    assert house.above(house.measure(), house.limits()) == []
    assert house.above({"ds_cmli/data": [8, 3]}, {"ds_cmli/data": [7, 3]}) == ["ds_cmli/data"]


def test_each_mutant_has_one_place_and_a_killer():
    for mutant in MUTANTS:
        assert mutated(mutant) != (ROOT / "ds_cmli" / mutant.file).read_text()
        file, _, function = mutant.killer.partition("::")
        assert f"def {function}(" in (ROOT / "tests" / file).read_text(), mutant.name
