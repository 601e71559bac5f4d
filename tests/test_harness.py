"""No room is above its limit, the mutants are of the package as it is, and tests of GPUs alone see GPUs."""

from types import SimpleNamespace

import pytest

from tests import conftest, house
from tests.mutations import MUTANTS, ROOT, mutated


def test_no_room_grows():
    assert house.above(house.measure(), house.limits()) == []
    assert house.above({"ds_cmli/data": [8, 3]}, {"ds_cmli/data": [7, 3]}) == ["ds_cmli/data"]


def test_each_mutant_has_one_place_and_a_killer():
    for mutant in MUTANTS:
        assert mutated(mutant) != (ROOT / "ds_cmli" / mutant.file).read_text()
        file, _, function = mutant.killer.partition("::")
        assert f"def {function}(" in (ROOT / "tests" / file).read_text(), mutant.name


@pytest.mark.parametrize("expression", ["gpu", "gpu and not slow", "gpu or null_gpu", "not slow and (gpu or null_gpu)"])
def test_gpus_are_seen_where_tests_of_them_alone_are_selected(expression):
    assert conftest.selects_gpu(expression) and not conftest.selects_gpu(expression.replace("gpu", "not gpu"))
    assert not conftest.selects_gpu("not slow") and not conftest.selects_gpu("(slow or null_gpu) and not gpu")
    item = SimpleNamespace(iter_markers=lambda: [SimpleNamespace(name="slow")])
    config = SimpleNamespace(option=SimpleNamespace(markexpr=expression))
    with pytest.raises(pytest.UsageError, match="-m gpu"):
        conftest.pytest_collection_finish(SimpleNamespace(config=config, items=[item]))
