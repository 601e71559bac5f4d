"""The mutants are of the package as it is; `mutations.py` makes them."""

import pytest

from tests.mutations import MUTANTS, ROOT, mutated


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_each_has_one_place_and_a_killer(mutant):
    assert mutated(mutant) != (ROOT / "ds_cmli" / mutant.file).read_text()
    file, _, function = mutant.killer.partition("::")
    assert f"def {function}(" in (ROOT / "tests" / file).read_text()
