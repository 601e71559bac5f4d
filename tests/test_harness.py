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


ON_GPUS = ("gpu", "gpu and not slow", "gpu or null_gpu", "gpu and slow", "not slow and (gpu or null_gpu)")
ON_CPUS = ("", "slow", "not slow and not gpu", "not gpu", "(slow or slurm or null_gpu) and not gpu", "not slow")


@pytest.mark.parametrize("expression", [*ON_GPUS, *ON_CPUS])
def test_gpus_are_seen_where_tests_of_them_are_selected(expression):
    assert conftest.selects_gpu(expression) == (expression in ON_GPUS)


@pytest.mark.parametrize(
    "expression, marks", [("", ("gpu", "slow")), ("not slow", ("gpu",)), ("gpu or slow", ("slow",))]
)
def test_those_with_and_without_gpus_do_not_run_together(expression, marks):
    item = SimpleNamespace(iter_markers=lambda: [SimpleNamespace(name=name) for name in marks])
    config = SimpleNamespace(option=SimpleNamespace(markexpr=expression))
    with pytest.raises(pytest.UsageError, match="-m gpu"):
        conftest.pytest_collection_finish(SimpleNamespace(config=config, items=[item]))
