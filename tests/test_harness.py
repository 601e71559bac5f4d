"""No total and no file is above its limit, and the mutants are of the package as it is."""

import pytest

from tests.mutations import MUTANTS, ROOT, TESTS, mutated

MAX_LINES = {"ds_cmli": 18_480, "tests": 12_220}  # of Python
MAX_FILE_LINES = 500


@pytest.mark.parametrize("folder, limit", MAX_LINES.items())
def test_no_total_and_no_file_is_above_its_limit(folder, limit):
    lines = {str(path): len(path.read_text("utf-8").splitlines()) for path in (ROOT / folder).rglob("*.py")}
    assert sum(lines.values()) <= limit, f"{folder}: {sum(lines.values())} lines"
    assert not {path: count for path, count in lines.items() if count > MAX_FILE_LINES}


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_each_mutant_has_one_place_and_a_killer(mutant):
    assert mutated(mutant) != (ROOT / "ds_cmli" / mutant.file).read_text()
    assert mutant.killer in TESTS, f"no test is named {mutant.killer}"
